"""Latency of the visual side on a GPU by batch and budget: engines, ONNX Runtime CUDA, and PyTorch, in turn.

Regime: at batch 1 a datacenter GPU is bound by kernel launches, from batch 4 or so on by its matrix units; the
selection's loop is one small kernel after another and grows with the budget. So the budget 1 stands for vision and
projector with as little selection as there is, and what a larger budget adds is the loop. PyTorch runs the module that
was exported, in fp16 where the bundle has it, eagerly and compiled. Times of whole runs are those of a caller who holds
arrays in host memory and wants arrays back, copies included; PyTorch's encoder alone and selection alone start and end
on the GPU.

Each variant runs in a process of its own; all take turns, batch by batch and budget by budget. What cannot run here is
named with its reason. ``--device cpu`` tries the script without a GPU (ONNX Runtime and PyTorch alone).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from output import finish

from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import list_engines
from flashvlm_export.errors import DependencyError, SessionError
from flashvlm_export.gpu import gpu_at_hand
from flashvlm_export.report.worker import Worker
from flashvlm_export.runtime.sessions.base import VisualSession
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.runtime.sessions.tensorrt import TensorRTSession
from flashvlm_export.specs import Array, Precision

Timed = Callable[[int, int], float]
_TEXT = 64


def feeds_of(bundle: Bundle, precision: Precision, batch: int, budget: int) -> dict[str, Array]:
    """Return noise of the graph's shapes."""
    dims, rng = bundle.manifest.dims, np.random.default_rng(0)
    return {
        "pixel_values": rng.standard_normal((batch, 3, dims.image_size, dims.image_size), np.float32),
        "text_embeds": rng.standard_normal((batch, _TEXT, dims.llm_width), np.float32).astype(precision.float_dtype),
        "text_mask": np.ones((batch, _TEXT), bool),
        "budget": np.array(budget),
    }


def make_session(path: Path, kind: str, precision: str, cuda_graphs: bool) -> Timed:
    """Return milliseconds of a run by batch and budget; ``kind`` is a provider or an engine's target."""
    bundle, chosen = Bundle.open(path), Precision(precision)
    session: VisualSession
    if kind.endswith("ExecutionProvider"):
        spec = bundle.manifest.graphs[precision].spec
        session = OnnxRuntimeSession(bundle.graph_file(chosen), spec, providers=(kind,))
    else:
        (engine,) = [e for e in list_engines(bundle) if (e.entry.target, e.entry.precision) == (kind, precision)]
        session = TensorRTSession(bundle, engine, cuda_graphs=cuda_graphs)
    session.open()

    def timed(batch: int, budget: int) -> float:
        feeds = feeds_of(bundle, chosen, batch, budget)
        start = time.perf_counter()
        session.run(feeds)
        return (time.perf_counter() - start) * 1e3

    return timed


def make_pytorch(path: Path, checkpoint: Path | None, precision: str, device: str, part: str) -> Timed:
    """Return the same for the exported module in PyTorch; ``part`` is eager, compiled, encoder or selection."""
    import torch

    from flashvlm_export.export.locate import open_weights
    from flashvlm_export.export.visual_graph import build_visual_graph
    from flashvlm_export.models import adapter_class
    from flashvlm_export.selection import get_selector

    torch.set_grad_enabled(False)
    bundle, chosen = Bundle.open(path), Precision(precision)
    manifest = bundle.manifest
    weights = open_weights(manifest.source.model, "random:0" if checkpoint is None else str(checkpoint))
    adapter = adapter_class(weights.config["model_type"])(weights.config)
    selector = get_selector(manifest.selection.selector)
    config = selector.make_config(manifest.selection.config)
    module: Any = build_visual_graph(adapter, weights, selector, config, chosen).to(device)
    run = module
    if part == "compiled":
        torch._dynamo.config.capture_scalar_outputs = True  # the budget decides a shape
        run = torch.compile(module)

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(batch: int, budget: int) -> float:
        tensors = [torch.from_numpy(array) for array in feeds_of(bundle, chosen, batch, budget).values()]
        if part in ("encoder", "selection"):
            pixels, text, mask, kept = (tensor.to(device) for tensor in tensors)
            features, saliency, tokens = module.encoder(pixels)
            synchronize()
            start = time.perf_counter()
            if part == "encoder":
                module.encoder(pixels)
            else:
                module.selector(features.float(), saliency, tokens.float(), text.float(), mask, kept)
        else:
            start = time.perf_counter()
            [output.cpu() for output in run(*(tensor.to(device) for tensor in tensors))[:3]]
        synchronize()
        return (time.perf_counter() - start) * 1e3

    return timed


def variants(args: argparse.Namespace, bundle: Bundle) -> dict[str, tuple[Callable[..., Timed], tuple[Any, ...]]]:
    """Return what may run: a name, and how it is made."""
    path = bundle.path
    provider = "CUDAExecutionProvider" if args.device == "cuda" else "CPUExecutionProvider"
    found: dict[str, tuple[Callable[..., Timed], tuple[Any, ...]]] = {}
    for engine in list_engines(bundle):
        entry = engine.entry
        for graphs in (False, True):
            name = f"{entry.backend} {entry.target} {entry.precision}{', CUDA graphs' if graphs else ''}"
            found[name] = (make_session, (path, entry.target, entry.precision, graphs))
    for precision in bundle.manifest.graphs:
        found[f"ONNX Runtime {args.device} {precision}"] = (make_session, (path, provider, precision, False))
    floating = next(name for name in ("fp16", "fp32") if name in bundle.manifest.graphs)
    for part in ("eager", "compiled", "encoder", "selection"):
        found[f"PyTorch {part} {floating}"] = (make_pytorch, (path, args.checkpoint, floating, args.device, part))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="weights for PyTorch (default: seeded random ones)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="images")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 32, 128, 576], help="visual tokens to keep")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that count, after three that do not")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of PyTorch and ONNX Runtime")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    bundle, gpu = Bundle.open(args.bundle), gpu_at_hand()
    sizes = [(batch, budget) for batch in args.batch for budget in args.budgets]
    times_ms: dict[str, dict[str, float]] = {}
    not_run: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (make, given) in variants(args, bundle).items():
            worker = stack.enter_context(Worker(make, *given))
            try:
                worker.wait()
            except (SessionError, DependencyError) as error:
                not_run[name] = error.what
                print(f"not run: {name}: {error.what}", file=sys.stderr)
                continue
            workers[name] = worker
        print(f"{'median ms: batch, budget':36}" + "".join(f"{f'{b}, {k}':>10}" for b, k in sizes), file=sys.stderr)
        taken: dict[str, dict[tuple[int, int], list[float]]] = {name: {s: [] for s in sizes} for name in workers}
        for size in sizes:
            running = list(workers)
            for number in range(args.repeats + 3):
                for name in list(running):
                    try:
                        milliseconds = workers[name](*size)
                    except SessionError as error:  # such as an engine whose profiles do not hold these sizes
                        not_run[f"{name}, batch {size[0]}, budget {size[1]}"] = error.what
                        running.remove(name)
                        continue
                    if number >= 3:
                        taken[name][size].append(milliseconds)
                running = running[1:] + running[:1]
    for name, by_size in taken.items():
        medians = {size: statistics.median(values) if values else float("nan") for size, values in by_size.items()}
        times_ms[name] = {f"{batch}, {budget}": round(ms, 3) for (batch, budget), ms in medians.items() if ms == ms}
        print(f"{name:36}" + "".join(f"{ms:10.2f}" for ms in medians.values()), file=sys.stderr)
    result = {
        "benchmark": "gpu_latency",
        "bundle": bundle.path.name,
        "gpu": None if gpu is None else gpu.name,
        "device": args.device,
        "repeats": args.repeats,
        "median_ms": times_ms,
        "not_run": not_run,
    }
    finish(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
