"""Latency of the full-size visual side: the authors' way, plain PyTorch, and the fused exported graph.

Regime: one image, float32, CPU. The encoder is 23 layers of matrix products with 577 rows, about 390 GFLOP with the
projector, so it is bound by the processor's multiply-add rate and not by memory; what differs between the variants is
what runs beside those products. The selection is the opposite: a few megabytes of cosines and a loop of some hundred
small operators, bound by the overhead of each. All variants have the same seeded random weights and the same inputs,
use the same number of threads, and take turns in an order that rotates, each in a process of its own; compare the
ratios, not the milliseconds. What the authors' way takes hangs on memory too: where glibc's allocator gives the 500 MB
of attention maps back to the system after each call, taking them again costs half as much as all the rest.

Variants:

- ``authors``            transformers' CLIP tower with eager attention, all layers, every attention map and hidden state
  kept, the projector run twice, selection as a loop over images in PyTorch
- ``torch``              the module this package exports, run by PyTorch as it is (scaled dot-product attention)
- ``compiled``           the same through ``torch.compile``
- ``fused bipartite``    the exported graph in ONNX Runtime, opened as the runtime opens it
- ``fused farthest``     the same with the other diversity step

``products`` are the encoder's and projector's matrix products alone, in PyTorch: what any float32 implementation has to
compute.

The share of the selection is measured on the part of the same ONNX graph that lies behind the projector, extracted into
a session of its own and run in the same rounds as the whole graph.

Exit code 1 if outputs do not agree: kept tokens are the reference's rows, the important half is the reference's, with
``farthest`` the whole kept set is; with ``bipartite``, whose other half hangs on rounding, the coverage is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from output import finish
from turns import take_turns
from visual_variants import FEEDS, make_variant, prepare, say

from flashvlm_export.errors import WorkerError
from flashvlm_export.report.worker import Worker
from flashvlm_export.selection import FlashVLMConfig, select_tokens
from flashvlm_export.selection.config import DIVERSITIES
from flashvlm_export.specs import VISUAL_OUTPUTS, Array

# Largest difference of a float32 tensor from the reference's, relative to the reference's largest magnitude.
TOLERANCE = 1e-3
# Largest difference of mean coverage between two kept sets of the same size.
COVERAGE_TOLERANCE = 0.02


class Agreement:
    """Compares every variant with the reference: transformers' own encoder and projector."""

    def __init__(self, reference: Mapping[str, Array], scores: Array, budget: int) -> None:
        self.features, self.tokens = reference["patch_features"], reference["projected_tokens"]
        self.important = self._best(scores, budget)
        self.budget = budget
        self.problems: list[str] = []
        self.measured: dict[str, dict[str, float]] = {}

    def close(self, name: str, have: Array, want: Array) -> float:
        """Return the relative error, and note a problem where it is above the tolerance."""
        error = float(np.abs(have - want).max() / np.abs(want).max())
        if not error <= TOLERANCE:  # written so that NaN fails too
            self.problems.append(f"{name}: relative error {error:.1e}, allowed {TOLERANCE:.0e}")
        return error

    def outputs(self, name: str, tokens: Array, indices: Array, scores: Array, *, kept: Array | None = None) -> None:
        """Check one variant; ``kept`` is the set it has to keep where the diversity step is stable."""
        rows = np.take_along_axis(self.tokens, indices[:, :, None], axis=1)
        error = self.close(f"{name}: visual tokens", tokens, rows)
        important = self._best(scores, self.budget)
        if not np.array_equal(important, self.important):
            self.problems.append(f"{name}: the important half is not the reference's")
        if not all(np.isin(best, row).all() for best, row in zip(important, indices, strict=True)):
            self.problems.append(f"{name}: a token of the important half is not kept")
        coverage = self.coverage(indices)
        self.measured[name] = {"token_error": error, "coverage": round(coverage, 4)}
        if kept is not None and not np.array_equal(kept, indices):
            self.problems.append(f"{name}: the kept set is not the reference's")

    def same_coverage(self, name: str, other: str) -> None:
        """Note a problem where two variants cover the image unequally well."""
        have, want = self.measured[name]["coverage"], self.measured[other]["coverage"]
        if not abs(have - want) <= COVERAGE_TOLERANCE:
            self.problems.append(f"{name}: coverage {have}, {other} has {want}")

    def coverage(self, indices: Array) -> float:
        """Return the mean over patches of the largest cosine to a kept one."""
        unit = self.features / np.linalg.norm(self.features, axis=-1, keepdims=True)
        per_image = [(u @ u[row].T).max(1).mean() for u, row in zip(unit, indices, strict=True)]
        return float(np.mean(per_image))

    @staticmethod
    def _best(scores: Array, budget: int) -> Array:
        return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, : budget // 2], axis=1)


def benchmark(args: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what was measured, and the problems found in the outputs."""
    say(f"{args.model}: seeded random weights, {args.threads} threads, budget {args.budget}, {args.text} text tokens")
    prepare(directory, args.model, args.threads, budget=args.budget, text=args.text)
    setup = (directory, args.model, args.threads)
    say("comparing outputs")
    with Worker(make_variant, "reference", *setup) as worker:
        reference = worker()
    with contextlib.ExitStack() as stack:
        variants = ["authors", "torch", *(["compiled"] if args.compile else []), *(f"fused {d}" for d in DIVERSITIES)]
        stages = ["products", "vision encoder", "projector", *(f"selection {d}" for d in DIVERSITIES)]
        front = ["preprocess", "tokenise and look up"]
        workers, outputs, failed = {}, {}, {}
        for name in [*variants, *stages, *front]:
            worker = stack.enter_context(Worker(make_variant, name, *setup))
            try:
                outputs[name] = worker()
            except WorkerError as error:
                if name != "compiled":  # without a C++ compiler, or on an untried torch: recorded as the result
                    raise
                failed[name] = error.what[:200]
                continue
            workers[name] = worker
        agreement = _compare(reference, {name: outputs[name] for name in variants if name in outputs}, directory)
        for name in ("patch_features", "saliency"):
            agreement.close(f"vision encoder: {name}", outputs["vision encoder"][name], reference[name])
        say(f"measuring {args.repeats} rounds of {len(workers)} functions in turn, each in a process of its own")
        times_ms = take_turns(workers, args.repeats)
    result = {
        "benchmark": "visual_latency",
        "model": args.model,
        "threads": args.threads,
        "budget": args.budget,
        "text_tokens": args.text,
        "repeats": args.repeats,
        "failed": failed,
        "median_ms": {name: round(statistics.median(values), 2) for name, values in times_ms.items()},
        "best_ms": {name: round(min(values), 2) for name, values in times_ms.items()},
        "agreement": agreement.measured,
        "problems": agreement.problems,
        "versions": _versions(),
    }
    for kind in ("median", "best"):
        values = result[f"{kind}_ms"]
        result[f"speed_up_of_{kind}"] = {
            name: round(values["authors"] / values[name], 2) for name in agreement.measured
        }
        result[f"selection_share_of_{kind}_percent"] = {
            diversity: round(100 * values[f"selection {diversity}"] / values[f"fused {diversity}"], 2)
            for diversity in DIVERSITIES
        }
    return result, agreement.problems


def _compare(reference: Mapping[str, Array], outputs: Mapping[str, Mapping[str, Array]], directory: Path) -> Agreement:
    """Compare each variant's outputs with the reference's features."""
    feeds = np.load(directory / FEEDS)
    agreement = Agreement(reference, outputs["authors"]["scores"], int(feeds["budget"]))
    stable = select_tokens(
        *(reference[name] for name in ("patch_features", "saliency", "projected_tokens")),
        feeds["text_embeds"],
        feeds["text_mask"],
        int(feeds["budget"]),
        FlashVLMConfig(diversity="farthest"),
    )
    for name, values in outputs.items():
        is_stable = name == "fused farthest"
        agreement.outputs(name, *(values[output] for output in VISUAL_OUTPUTS), kept=stable if is_stable else None)
        if not is_stable:
            agreement.same_coverage(name, "authors")
    return agreement


def print_tables(result: dict[str, Any]) -> None:
    """Print the result for people, on standard error."""
    median, best = result["median_ms"], result["best_ms"]
    ratio, best_ratio = result["speed_up_of_median"], result["speed_up_of_best"]
    say(
        f"\n{'variant':24}{'median ms':>11}{'best ms':>11}{'speed-up':>10}{'of best':>9}"
        f"{'token error':>13}{'coverage':>10}"
    )
    for name, measured in result["agreement"].items():
        say(
            f"{name:24}{median[name]:11.0f}{best[name]:11.0f}{ratio[name]:9.2f}x{best_ratio[name]:8.2f}x"
            f"{measured['token_error']:13.1e}{measured['coverage']:10.3f}"
        )
    for name, reason in result["failed"].items():
        say(f"{name}: {reason}")
    say(f"\n{'stage':24}{'median ms':>11}{'best ms':>11}{'of fused':>10}{'of best':>9}")
    stages = (
        "preprocess",
        "tokenise and look up",
        "vision encoder",
        "projector",
        *(f"selection {name}" for name in DIVERSITIES),
        "products",
    )
    for name in stages:
        whole = "fused farthest" if name.endswith("farthest") else "fused bipartite"
        shares = (100 * median[name] / median[whole], 100 * best[name] / best[whole])
        say(f"{name:24}{median[name]:11.2f}{best[name]:11.2f}{shares[0]:9.2f}%{shares[1]:8.2f}%")


def _versions() -> dict[str, str]:
    import onnxruntime
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


@contextlib.contextmanager
def workspace(keep: Path | None) -> Iterator[Path]:
    """Yield ``keep``, or a directory that is removed."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="flashvlm-bench-") as directory:
        yield Path(directory)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="llava-1.5-7b", help="registry name")
    parser.add_argument("--budget", type=int, default=128, help="visual tokens to keep")
    parser.add_argument("--text", type=int, default=60, help="text tokens that guide the selection")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every variant")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="include torch.compile")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the graphs (3 GB) here and use them again")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    with workspace(args.keep) as directory:
        result, problems = benchmark(args, directory)
    print_tables(result)
    for problem in problems:
        say(f"WRONG: {problem}")
    finish(result, args.output)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
