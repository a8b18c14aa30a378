"""Latency of each graph of a bundle in ONNX Runtime, side by side: what a precision gains or costs on a processor.

Regime: one image on the CPU provider, matrix products. INT8 products are faster than float32 ones where the processor
has instructions for them (VNNI, AMX); but the graphs are typed for TensorRT (float16 between the Q/DQ pairs), and ONNX
Runtime computes float16 in float32 with casts around each operator, which costs more than that gains. The graphs take
turns, each in a process of its own; compare the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from output import finish
from turns import take_turns

from flashvlm_export.bundle import Bundle
from flashvlm_export.report.worker import Worker
from flashvlm_export.runtime.graph_inputs import GraphInputs
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.specs import Precision


def make_run(path: Path, precision: str, budget: int, threads: int) -> Callable[[], None]:
    """Return a function that runs the graph once, on noise."""
    bundle = Bundle.open(path)
    chosen, inputs = Precision(precision), GraphInputs(bundle)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    feeds = inputs.feeds(noise, inputs.random_text_rows(0, chosen), budget)
    session = OnnxRuntimeSession(bundle.graph_file(chosen), bundle.manifest.graphs[precision].spec, threads=threads)
    session.open()

    def run() -> None:
        session.run(feeds)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budget", type=int, default=128, help="visual tokens to keep")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every graph")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    names = list(Bundle.open(args.bundle).manifest.graphs)
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(make_run, args.bundle, name, args.budget, args.threads)) for name in names
        }
        times_ms = take_turns(workers, args.repeats)
    medians_ms = {name: statistics.median(values) for name, values in times_ms.items()}
    for name, median_ms in medians_ms.items():
        print(f"{name:6}{median_ms:9.0f} ms{median_ms / medians_ms[names[0]]:8.2f} of {names[0]}", file=sys.stderr)
    result = {
        "benchmark": "graph_latency",
        "threads": args.threads,
        "budget": args.budget,
        "median_ms": {name: round(value, 1) for name, value in medians_ms.items()},
        "best_ms": {name: round(min(values), 1) for name, values in times_ms.items()},
    }
    finish(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
