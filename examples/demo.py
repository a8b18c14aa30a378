"""One picture and seven questions through a bundle of flashvlm-tiny, and the same in PyTorch.

usage: python examples/demo.py BUNDLE CHECKPOINT [--budget 128] [--positions original] [--heatmap OUT.png]
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np

from flashvlm_export.bundle import Bundle
from flashvlm_export.export.reference import LlavaReference
from flashvlm_export.runtime.graph_inputs import visual_feeds
from flashvlm_export.runtime.heatmap import draw_selection, save_picture, stack
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Answer, Request
from flashvlm_export.selection import get_selector

# A scene that the model was not trained on (benchmarks/tiny/scenes.py, number 11,000,003), and what is true of it.
PICTURE = Path(__file__).parent / "scene.png"
QUESTIONS = {
    "What word is beside the white cross?": "stop",
    "What number is beside the blue cross?": "93",
    "How many crosses are there?": "three",
    "What colour is the circle?": "black",
    "Which shape is at the top right?": "triangle",
    "Is there a red circle?": "no",
    "Is the purple cross below the triangle?": "yes",
}
NEW_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--positions", choices=("contiguous", "original"), default="original", help="of kept tokens")
    parser.add_argument("--heatmap", type=Path, default=Path("kept.png"))
    args = parser.parse_args()

    bundle = Bundle.open(args.bundle)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    with Pipeline.open(bundle) as vlm:
        vlm.ask(PICTURE, next(iter(QUESTIONS)), budget=args.budget, params=params)  # warm-up
        everything = vlm.visual_tokens
        print(f"\n{PICTURE}, --positions {args.positions}\n\n{'':44}{args.budget} of {everything} tokens   all tokens")
        answers, sheets = [], []
        for question, right in QUESTIONS.items():
            request = Request([PICTURE], question)
            prompt = vlm.encode([request], budget=args.budget, positions=args.positions)[0]
            answer = vlm.answer(prompt, params)
            unpruned = vlm.ask(PICTURE, question, budget=everything, params=params)
            answers.append((answer, unpruned))
            said = [
                f"{each.text.strip()}{'' if each.text.strip() == right else ' (WRONG)'}" for each in (answer, unpruned)
            ]
            print(f"  {question:42}{said[0]:20}{said[1]}")
            caption = f"{question}\n{said[0]}"
            kept = prompt.images[0]
            sheets.append(draw_selection(vlm.views(PICTURE), kept.indices, kept.scores, kept.layout.grids, caption))
        save_picture(stack(sheets), args.heatmap)

        pruned, unpruned = answers[-1]
        print(f"\n{'Stage':18}{args.budget} tokens     all tokens")
        for stage, ms in pruned.stage_ms.items():
            print(f"  {stage:12} {ms:10.1f} ms {unpruned.stage_ms[stage]:10.1f} ms")
        compare(vlm, args.checkpoint, args.budget, [pair[0] for pair in answers], [pair[1] for pair in answers])
    print(f"\nKept tokens, drawn on the picture question by question: {args.heatmap}")


def compare(vlm: Pipeline, checkpoint: Path, budget: int, pruned: list[Answer], unpruned: list[Answer]) -> None:
    """Print how the same questions fare in PyTorch, through transformers' own model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice on generation settings
        reference = LlavaReference(checkpoint)
    selection = vlm.bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)
    picture = vlm.inputs.prepare(load_image(PICTURE))
    pixels = picture.inputs["pixel_values"]
    overlaps, errors, same = [], [], {"kept": 0, "all": 0}
    for question, answer, other in zip(QUESTIONS, pruned, unpruned, strict=True):
        tokenized = vlm.prompts.chat(question)
        rows = vlm.embeddings.lookup(tokenized.text_ids("prompt"), np.dtype(np.float32))
        feeds = visual_feeds([picture], [rows], budget)
        have = vlm.session.run(feeds)
        want = reference.visual(pixels, feeds["text_embeds"], feeds["text_mask"], budget, config)
        common = np.intersect1d(have.indices, want.indices).size
        overlaps.append(common / np.union1d(have.indices, want.indices).size)
        of_graph = np.take_along_axis(want.all_tokens, have.indices[:, :, None], axis=1)
        errors.append(np.abs(have.tokens - of_graph).max() / np.abs(want.all_tokens).max())
        prompt = answer.prompt
        said = reference.generate(prompt.inputs_embeds, NEW_TOKENS, positions=prompt.positions)
        same["kept"] += said == answer.token_ids
        same["all"] += reference.generate_unpruned(tokenized.token_ids, pixels, NEW_TOKENS) == other.token_ids
    seconds = {"PyTorch": [], "graph": []}
    for _ in range(3):
        start = time.perf_counter()
        reference.encode(pixels)
        middle = time.perf_counter()
        vlm.session.run(feeds)
        seconds["PyTorch"].append(middle - start)
        seconds["graph"].append(time.perf_counter() - middle)
    print("\nAgainst PyTorch (transformers, float32, eager attention)")
    print(
        f"  kept tokens: IoU {min(overlaps):.3f} or more; visual tokens: error {max(errors):.1e} of the largest or less"
    )
    print(f"  answers from the kept tokens: {same['kept']} of {len(QUESTIONS)} the same, token by token")
    print(f"  answers from all tokens:      {same['all']} of {len(QUESTIONS)} the same, token by token")
    print(
        f"  encoder and projector in PyTorch {min(seconds['PyTorch']) * 1e3:.1f} ms; "
        f"with selection in the graph {min(seconds['graph']) * 1e3:.1f} ms\n"
        "  (a toy model: benchmarks/results has the ratio at full size)"
    )


if __name__ == "__main__":
    main()
