"""An image in tiles: one budget for the whole image, or an even share of it for each picture?

Four scenes side by side make an image of 672 x 672 pixels, which LLaVA-NeXT sees in an overview and four tiles, each of
them a scene as flashvlm-tiny's encoder knows it. The question is about an object of one scene. Of the patches that show
that object in its tile, how many are kept, and is any?

Regime: accuracy of selection alone; nothing is timed. The language model, trained on one picture, has no part.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from output import finish
from PIL import Image
from tiny.scenes import GRID, SIDE, SPLITS, draw_question, make_scene, patch_owners, render

from flashvlm_export.bundle import Bundle
from flashvlm_export.export.reference import make_reference
from flashvlm_export.progress import Progress
from flashvlm_export.runtime.graph_inputs import GraphInputs
from flashvlm_export.runtime.layout import overview_and_tiles
from flashvlm_export.selection import get_selector, select_tokens
from flashvlm_export.specs import Array, Precision

KINDS = ("colour", "shape", "reading")  # about one object that the question names
PICTURES = 5


def mosaic(seeds: list[int]) -> tuple[list[Image.Image], Array]:
    """Return overview and tiles, and the owner of each patch of the tiles ``[4, 24, 24]``."""
    scenes = [make_scene(seed) for seed in seeds]
    tiles = [render(scene) for scene in scenes]
    whole = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for number, tile in enumerate(tiles):
        whole.paste(tile, (SIDE * (number % 2), SIDE * (number // 2)))
    overview = whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return [overview, *tiles], np.stack([patch_owners(scene) for scene in scenes])


def questions(count: int) -> list[tuple[list[int], int, str, int]]:
    """Return seeds of four scenes, which of them is asked about, the question, and the object that it names."""
    rng, found, start = np.random.default_rng(0), [], SPLITS["dev"][0]
    while len(found) < count:
        seeds = list(range(start, start + 4))
        start += 4
        asked = int(rng.integers(4))
        question = draw_question(make_scene(seeds[asked]), KINDS[len(found) % len(KINDS)], rng)
        if question is not None and len(question.mentions) == 1:
            found.append((seeds, asked, question.text, question.mentions[0][1]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="of flashvlm-tiny, for its tokenizer and embeddings")
    parser.add_argument("--checkpoint", type=Path, default=Path("benchmarks/tiny/checkpoint"))
    parser.add_argument(
        "--selector", choices=("flashvlm", "flashvlm-soft"), default="flashvlm", help="both by distance"
    )
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--budgets", default="640,320,160,80", help="of a whole image, multiples of 5")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    budgets = [int(text) for text in args.budgets.split(",")]
    inputs, reference = GraphInputs(Bundle.open(args.bundle)), make_reference(args.checkpoint)
    config = get_selector(args.selector).make_config({"diversity": "farthest"})
    order = overview_and_tiles((2 * SIDE, 2 * SIDE), (2, 2), (GRID, GRID))[0].order
    kept_shares: dict[tuple[str, int], list[float]] = {}
    asked = questions(args.questions)
    for seeds, which, question, thing in Progress.on_stderr().track(asked, "questions"):
        pictures, owners = mosaic(seeds)
        with torch.no_grad():
            parts: Any = reference.encode(inputs.preprocess(pictures))
        text = inputs.text_rows(question, Precision.FP32)[None]
        shown = np.zeros((PICTURES, GRID * GRID), np.bool_)
        shown[1 + which] = owners[which].ravel() == 1 + thing
        whole = [part.reshape(1, PICTURES * GRID * GRID, *part.shape[2:])[:, order] for part in parts]
        for budget in budgets:
            mask = np.ones(text.shape[:2], np.bool_)
            together = select_tokens(*whole, text, mask, budget, config)[0]
            repeated = np.repeat(text, PICTURES, 0)
            each = select_tokens(*parts, repeated, np.repeat(mask, PICTURES, 0), budget // PICTURES, config)
            kept = {"whole image": np.zeros(shown.size, np.bool_), "each picture": np.zeros(shown.shape, np.bool_)}
            kept["whole image"][order[together]] = True
            np.put_along_axis(kept["each picture"], each, True, axis=1)
            for name, marks in kept.items():
                share = marks.ravel()[shown.ravel()].mean()
                kept_shares.setdefault((name, budget), []).append(float(share))
    rows = [
        {
            "budget_of": name,
            "budget": budget,
            "object_patches_kept": float(np.mean(shares)),
            "object_found": float(np.mean(np.array(shares) > 0)),
        }
        for (name, budget), shares in kept_shares.items()
    ]
    for row in rows:
        print(
            f"{row['budget_of']:14}{row['budget']:6}  {row['object_patches_kept']:.3f} of the object's patches, "
            f"{row['object_found']:.3f} of the objects",
            file=sys.stderr,
        )
    finish({"benchmark": "tile_budget", "selector": args.selector, "questions": len(asked), "rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
