"""Language model engines on the same pruned prompts: time from embeddings to the first token, and tokens per second.

Regime: CPU, matrix products in prefill, memory bandwidth in decode. The visual side runs first; each engine then
prefills the same rows and decodes the same number of tokens. Engines and budgets take turns in one process, after a
round that does not count, each round about another picture, so that no engine has seen its prompt before; compare the
ratios. ``same`` counts the tokens up to the first that differs from the first engine's.

``second question`` is the same image asked again through encoder and selector as graphs of their own, which pays
selection and prefill, beside the first question and beside the fused graph. ``cache`` is the memory that keys and
values of the prompt take in the bundle's decoder: counted from its shapes, and as what is resident with the cache kept
beyond what is resident without it.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from output import finish

from flashvlm_export.bundle import Bundle
from flashvlm_export.manifest import DecoderEntry
from flashvlm_export.runtime.llm.base import LLMEngine, SamplingParams
from flashvlm_export.runtime.llm.registry import require_same_model
from flashvlm_export.runtime.llm.vllm_offline import VllmOfflineLLM
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import PrunedPrompt, Request
from flashvlm_export.specs import Array

_M_MMAP_THRESHOLD = -3  # of malloc.h
MAX_POSITIONS = 1024  # of a prompt and its answer
QUESTION = "What is in the picture, and where is it?"


def picture(seed: int) -> Array:
    """Return noise of a photograph's size."""
    return np.random.default_rng(seed).integers(0, 256, (480, 640, 3), np.uint8)


def prompts_of(bundle: Bundle, budgets: list[int], rounds: int, threads: int) -> list[dict[int, PrunedPrompt]]:
    """Return, for each round, the pruned prompt at each budget."""
    with Pipeline.open(bundle, llm=None, threads=threads) as vlm:
        return [
            {budget: vlm.encode([Request([picture(seed)], QUESTION)], budget=budget)[0] for budget in budgets}
            for seed in range(rounds)
        ]


def measure_engines(
    engines: dict[str, LLMEngine], rounds: list[dict[int, PrunedPrompt]], new_tokens: int
) -> list[dict[str, Any]]:
    """Return a row per engine and budget, medians over all rounds but the first."""
    prefill: dict[tuple[str, int], list[float]] = {}
    decode: dict[tuple[str, int], list[float]] = {}
    said: dict[tuple[str, int], list[int]] = {}
    params = SamplingParams(max_new_tokens=new_tokens)
    for turn, prompts in enumerate(rounds):
        for name, engine in engines.items():
            for budget, prompt in prompts.items():
                said[name, budget] = list(engine.generate(prompt.inputs_embeds, params, stop_token_ids=()))
                stats = engine.last_run
                assert stats is not None
                if turn:
                    prefill.setdefault((name, budget), []).append(stats.prefill_ms)
                    decode.setdefault((name, budget), []).append(stats.decode_ms / max(stats.new_tokens - 1, 1))
    first = next(iter(engines))
    return [
        {
            "engine": name,
            "budget": budget,
            "prompt_tokens": len(rounds[-1][budget].inputs_embeds),
            "prefill_ms": statistics.median(times),
            "tokens_per_second": 1e3 / statistics.median(decode[name, budget]),
            "same_tokens": int(
                np.cumprod([a == b for a, b in zip(said[name, budget], said[first, budget], strict=False)]).sum()
            ),
        }
        for (name, budget), times in prefill.items()
    ]


def measure_second_question(bundle: Bundle, budget: int, repeats: int, threads: int) -> dict[str, float]:
    """Return median milliseconds of the visual side: fused, of a first question, and of a second one."""
    times: dict[str, list[float]] = {"fused": [], "first": [], "second": []}
    with ExitStack() as stack:
        fused = stack.enter_context(Pipeline.open(bundle, llm=None, threads=threads))
        split = stack.enter_context(Pipeline.open(bundle, llm=None, threads=threads, selectors=[]))
        for turn in range(repeats + 1):
            split.images.clear()
            for name, vlm in (("fused", fused), ("first", split), ("second", split)):
                stages = vlm.encode([Request([picture(turn)], QUESTION)], budget=budget)[0].stage_ms
                if turn:
                    times[name].append(sum(stages.values()))
    return {f"{name}_ms": statistics.median(values) for name, values in times.items()}


def cache_bytes(decoder: DecoderEntry, positions: int) -> int:
    """Return what keys and values of ``positions`` take, in the decoder's dtype."""
    size = 2 if decoder.precision == "fp16" else 4
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_size * positions * size


def measure_cache(bundle: Path, prompts: dict[int, tuple[Array, Array]]) -> dict[int, int]:
    """Return bytes per prompt that are resident beyond those without it while keys and values of it are kept.

    For a process of its own, in which whatever is freed is given back at once.

    Args:
        bundle: whose decoder it is.
        prompts: by budget, rows and positions.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    found = {}
    vlm = Pipeline.open(bundle)
    assert vlm.llm is not None
    with vlm.llm as engine:
        for budget, (rows, positions) in prompts.items():
            resident = []
            for keep in (False, False, True):  # after two runs everything else stays as it is
                engine.reuse_prefix = keep
                list(engine.generate(rows, SamplingParams(1), stop_token_ids=(), positions=positions))
                resident.append(psutil.Process().memory_info().rss)
            found[budget] = int(resident[-1] - resident[-2])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="exported with --split flashvlm")
    parser.add_argument("--llm", metavar="ENGINE", action="append", help="as of flashvlm run; repeat for several")
    parser.add_argument("--budgets", default="576,128,32")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    budgets = [int(text) for text in args.budgets.split(",")]
    rounds = prompts_of(bundle, budgets, args.repeats + 1, args.threads)
    second = measure_second_question(bundle, budgets[-1], args.repeats, args.threads)
    with ExitStack() as stack:
        engines: dict[str, LLMEngine] = {}
        for wanted in args.llm or ["onnxruntime"]:
            vlm = Pipeline.open(bundle, llm=wanted, threads=args.threads)
            assert vlm.llm is not None
            if isinstance(vlm.llm, VllmOfflineLLM):  # by itself it halves the precision
                vlm.llm.options = {"dtype": "float32", "max_model_len": MAX_POSITIONS, "enable_prefix_caching": False}
            engine = stack.enter_context(vlm.llm)
            require_same_model(engine, bundle.manifest, vlm.embeddings)
            name, _, where = wanted.partition(":")
            engines[f"{name} {Path(where).name}".strip()] = engine
        rows = measure_engines(engines, rounds, args.new_tokens)
    decoder, prompts, cache = bundle.manifest.decoder, rounds[-1], {}
    if decoder is not None:
        given = {budget: (prompt.inputs_embeds, prompt.positions) for budget, prompt in prompts.items()}
        with multiprocessing.get_context("spawn").Pool(1) as process:
            resident = process.apply(measure_cache, (args.bundle, given))
        cache = {
            budget: {
                "positions": len(rows_of_it),
                "counted_bytes": cache_bytes(decoder, len(rows_of_it)),
                "resident_bytes": resident[budget],
            }
            for budget, (rows_of_it, _) in given.items()
        }
    print(f"{'engine':32}{'budget':>8}{'prompt':>8}{'prefill, ms':>14}{'tokens/s':>10}{'same':>6}", file=sys.stderr)
    for row in rows:
        print(
            f"{row['engine']:32}{row['budget']:8}{row['prompt_tokens']:8}{row['prefill_ms']:14.1f}"
            f"{row['tokens_per_second']:10.1f}{row['same_tokens']:6}",
            file=sys.stderr,
        )
    print(
        f"visual side at {budgets[-1]} tokens: fused {second['fused_ms']:.0f} ms, encoder and selector apart "
        f"{second['first_ms']:.0f} ms, the second question {second['second_ms']:.0f} ms",
        file=sys.stderr,
    )
    for budget, sizes in cache.items():
        print(
            f"keys and values at {budget} tokens, {sizes['positions']} positions: "
            f"{sizes['counted_bytes'] / 1e6:.1f} MB counted, {sizes['resident_bytes'] / 1e6:.1f} MB resident",
            file=sys.stderr,
        )
    result = {
        "benchmark": "llm_engines",
        "model": bundle.manifest.source.model,
        "threads": args.threads,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "rows": rows,
        "second_question": second,
        "cache": cache,
    }
    finish(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
