"""One photograph through a bundle and through PyTorch: kept tokens, answer, times, agreement.

usage: python examples/demo.py BUNDLE CHECKPOINT [--heatmap OUT.png]
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import skimage.data

from flashvlm_export.bundle import Bundle
from flashvlm_export.export.reference import LlavaReference
from flashvlm_export.runtime.embeddings import pad_text
from flashvlm_export.runtime.heatmap import draw_selection, save_picture
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline, Request
from flashvlm_export.selection import get_selector

QUESTION = "What is the animal in this picture looking at?"
NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--heatmap", type=Path, default=Path("kept.png"))
    args = parser.parse_args()

    bundle = Bundle.open(args.bundle)
    photograph = skimage.data.chelsea()  # a cat, 451 x 300, CC0
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    with Pipeline.open(bundle) as vlm:
        vlm.ask(photograph, QUESTION, budget=args.budget, params=params)  # warm-up
        prompt = vlm.encode([Request([photograph], QUESTION)], budget=args.budget)[0]
        print(f"\n{QUESTION}\n  ", end="")
        answer = vlm.answer(prompt, params, on_text=lambda piece: print(piece, end="", flush=True))
        unpruned = vlm.ask(photograph, QUESTION, budget=vlm.visual_tokens, params=params)
        picture = draw_selection(
            vlm.view(photograph),
            prompt.indices[0],
            prompt.scores[0],
            bundle.manifest.dims.grid,
            f"{QUESTION}\n{answer.text.strip()}",
        )
        save_picture(picture, args.heatmap)

        print("\n\nStage               pruned    all tokens")
        for stage, ms in answer.stage_ms.items():
            print(f"  {stage:<12} {ms:10.1f} ms {unpruned.stage_ms[stage]:10.1f} ms")
        print(f"  {'visual tokens':<12} {prompt.visual_tokens_kept:9} {unpruned.prompt.visual_tokens_kept:13}")
        compare(vlm, args.checkpoint, photograph, args.budget, answer.token_ids, unpruned.token_ids)

    print(f"\nKept tokens drawn on the photograph: {args.heatmap}")
    print("The demo's model has random weights: its answers mean nothing, their agreement does.")


def compare(
    vlm: Pipeline, checkpoint: Path, photograph: np.ndarray, budget: int, pruned_ids: list[int], all_ids: list[int]
) -> None:
    """Print how the same photograph and question fare in PyTorch, through transformers' own model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice on generation settings
        reference = LlavaReference(checkpoint)
    tokenized = vlm.prompts.chat(QUESTION)
    pixels = vlm.preprocess([load_image(photograph)])
    rows = vlm.embeddings.lookup(tokenized.text_ids("prompt"), np.dtype(np.float32))
    text_embeds, text_mask = pad_text([rows])
    selection = vlm.bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)

    feeds = {
        "pixel_values": pixels,
        "text_embeds": text_embeds,
        "text_mask": text_mask,
        "budget": np.array(budget, np.int64),
    }
    seconds: dict[str, float] = {}
    for _ in range(3):
        start = time.perf_counter()
        reference.encode(pixels)
        middle = time.perf_counter()
        outputs = vlm.session.run(feeds)
        seconds["PyTorch"] = min(seconds.get("PyTorch", 1e9), middle - start)
        seconds["graph"] = min(seconds.get("graph", 1e9), time.perf_counter() - middle)
    expected = reference.visual(pixels, text_embeds, text_mask, budget, config)
    common = np.intersect1d(outputs.indices, expected.indices).size
    union = np.union1d(outputs.indices, expected.indices).size
    largest = float(np.abs(expected.all_tokens).max())
    rows_of_graph = np.take_along_axis(expected.all_tokens, outputs.indices[:, :, None], axis=1)
    error = float(np.abs(outputs.tokens - rows_of_graph).max()) / largest
    prompt = vlm.encode([Request([photograph], QUESTION)], budget=budget)[0]
    reference_pruned = reference.generate(prompt.inputs_embeds, NEW_TOKENS)
    reference_all = reference.generate_unpruned(tokenized.token_ids, pixels, NEW_TOKENS)
    print("\nAgainst PyTorch (transformers, float32, eager attention)")
    print(f"  kept tokens: {common} of {budget} the same (IoU {common / union:.3f})")
    print(f"  visual tokens: largest error {error:.1e} of the largest magnitude")
    print(f"  answer from the kept tokens: {'the same' if reference_pruned == pruned_ids else 'DIFFERENT'} token ids")
    print(f"  answer from all tokens:      {'the same' if reference_all == all_ids else 'DIFFERENT'} token ids")
    print(
        f"  encoder and projector in PyTorch {seconds['PyTorch'] * 1e3:.1f} ms; "
        f"with selection in the graph {seconds['graph'] * 1e3:.1f} ms\n"
        "  (a toy model: benchmarks/results has the ratio at full size)"
    )


if __name__ == "__main__":
    main()
