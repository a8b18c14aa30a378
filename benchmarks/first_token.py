"""Time to the first token by token budget and number of images, beside what the operation counts allow.

Regime: CPU, matrix products. The encoder costs the same at every budget; the language model's prefill grows with the
tokens that are kept. What pruning can save is therefore bounded by the encoder's share. ``bound`` states it: the same
ratio, had every multiply-add of encoder, projector and language model taken the same time. Budgets take turns in one
process, after a round that does not count; compare the ratios.

Without BUNDLE, a LLaVA of a ViT-L/336 and a language model in the shapes of TinyLlama-1.1B (22 layers, width 2048,
4 key/value heads), both with random weights, is made and exported first: 3 minutes, 12 GB of memory and 10 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from output import finish

from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Request

QUESTION = "What is in the picture, and where is it?"
TEXT = {"width": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "inner": 5632}
VISION = {"width": 1024, "layers": 23, "inner": 4096}


def make_bundle(folder: Path) -> Path:
    """Write checkpoint and bundle below ``folder``; a bundle that stands is taken as it is."""
    bundle = folder / "bundle"
    if (bundle / "manifest.json").is_file():
        return bundle
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch; from pathlib import Path;"
        "from helpers.tiny_llava import make_tiny_llava; from transformers import CLIPVisionConfig, LlamaConfig;"
        "vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,"
        " num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768);"
        "text = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,"
        " num_key_value_heads=4, vocab_size=320, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2);"
        "make_tiny_llava(Path(sys.argv[1]), dtype=torch.float16, image_size=336, vision_config=vision,"
        " text_config=text)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(folder.resolve() / "checkpoint")], cwd=root, check=True)
    command = [sys.executable, "-m", "flashvlm_export", "export", str(folder / "checkpoint"), "--output", str(bundle)]
    command += ["--precision", "fp32", "--decoder", "fp32", "--engine-check", "off"]
    subprocess.run(command, check=True)
    return bundle


def multiply_adds(images: int, kept: int, text: int) -> tuple[float, float]:
    """Return multiply-adds of the visual side and of prefill; attention counts both of its products."""
    patches, vision, llm = 577, VISION, TEXT
    layer = 4 * vision["width"] ** 2 + 2 * vision["width"] * vision["inner"]
    visual = vision["layers"] * patches * (layer + 2 * patches * vision["width"])
    visual += 576 * (vision["width"] * llm["width"] + llm["width"] ** 2)
    head = llm["width"] // llm["heads"]
    layer = 2 * llm["width"] ** 2 + 2 * llm["width"] * head * llm["kv_heads"] + 3 * llm["width"] * llm["inner"]
    tokens = images * kept + text
    # Causal attention needs half of its square; the runtime computes it whole, so the whole is counted.
    prefill = llm["layers"] * tokens * (layer + 2 * tokens * llm["width"])
    return float(images * visual), float(prefill)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="of the shapes above; made without it")
    parser.add_argument("--images", default="1,2,4", help="numbers of images in one prompt")
    parser.add_argument(
        "--budgets", default="576,128,32", help="visual tokens kept per image; the first is the measure"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every operator")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to make the bundle, for the next run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    budgets = [int(text) for text in args.budgets.split(",")]
    folder = tempfile.TemporaryDirectory() if args.keep is None else nullcontext(str(args.keep))
    with folder as place:
        bundle = args.bundle or make_bundle(Path(place))
        counts = [int(text) for text in args.images.split(",")]
        rows = [row for count in counts for row in measure(bundle, count, budgets, args.repeats, args.threads)]
    result = {"benchmark": "first_token", "threads": args.threads, "repeats": args.repeats, "rows": rows}
    finish(result, args.output)
    return 0


def measure(bundle: Path, images: int, budgets: list[int], repeats: int, threads: int) -> list[dict[str, float]]:
    """Return a row per budget: medians of visual side, prefill and both, and the ratio to the first budget."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (336, 336, 3), np.uint8) for _ in range(images)]
    stages: dict[int, list[tuple[float, float, float]]] = {budget: [] for budget in budgets}
    with Pipeline.open(bundle, threads=threads) as vlm:
        dims, decoder = vlm.bundle.manifest.dims, vlm.bundle.manifest.decoder
        shapes = (dims.vision_width, dims.llm_width, decoder.num_layers if decoder else 0)
        if shapes != (VISION["width"], TEXT["width"], TEXT["layers"]):
            raise SystemExit(f"{bundle} is of other shapes than the bound is counted for: {shapes}")
        for turn in range(repeats + 1):
            for budget in budgets[turn % len(budgets) :] + budgets[: turn % len(budgets)]:
                prompt = vlm.encode([Request(pictures, QUESTION)], budget=budget)[0]
                answer = vlm.answer(prompt, SamplingParams(max_new_tokens=1))
                visual = sum(prompt.stage_ms.values())
                if turn:
                    stages[budget].append((visual, answer.stats.prefill_ms, visual + answer.stats.prefill_ms))
        text = answer.stats.prompt_tokens - prompt.visual_tokens_kept
    rows = []
    first = [statistics.median(column) for column in zip(*stages[budgets[0]], strict=True)]
    for budget in budgets:
        visual, prefill, total = (statistics.median(column) for column in zip(*stages[budget], strict=True))
        bound = sum(multiply_adds(images, budgets[0], text)) / sum(multiply_adds(images, budget, text))
        row = {
            "images": images,
            "budget": budget,
            "visual_ms": round(visual, 1),
            "prefill_ms": round(prefill, 1),
            "first_token_ms": round(total, 1),
            "times_sooner": round(first[2] / total, 2),
            "prefill_times_sooner": round(first[1] / prefill, 2),
            "bound": round(bound, 2),
        }
        rows.append(row)
        print(
            f"{images} image(s), {budget:4} tokens each: first token {total:8.0f} ms = visual {visual:7.0f} + prefill "
            f"{prefill:7.0f}; {row['times_sooner']:5.2f} times sooner, operation counts allow {bound:5.2f}",
            file=sys.stderr,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
