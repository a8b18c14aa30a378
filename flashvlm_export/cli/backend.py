"""Options that say what runs the graph and the language model, shared by the verbs that answer questions."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import UsageError
from flashvlm_export.ort import PROVIDERS
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import Precision

if TYPE_CHECKING:
    from flashvlm_export.runtime.pipeline import Pipeline


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what runs the visual side, from ``--text-span`` to ``--threads``."""
    parser.add_argument(
        "--text-span",
        choices=("prompt", "question"),
        default="prompt",
        help="text that guides selection: the whole prompt, as the authors do, or the question alone",
    )
    parser.add_argument(
        "--positions",
        choices=("contiguous", "original"),
        help="of kept visual tokens in the language model: without gaps, or where they stood (default: contiguous, but "
        "original for models whose positions have three axes, as the authors do)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), help="visual graph (default: the bundle's first)"
    )
    parser.add_argument(
        "--selector",
        metavar="NAME",
        help="run the encoder and this selector as graphs of their own, so that an image is encoded once for many "
        "questions; needs a bundle exported with --split (eval takes several, with commas, or all)",
    )
    parser.add_argument(
        "--engine",
        metavar="TARGET",
        nargs="?",
        const="auto",
        help="run the visual side as the bundle's TensorRT engine for TARGET (without a name: its only one, or the one "
        "for the GPU at hand)",
    )
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="replay the engine's kernels as one CUDA graph for each set of sizes"
    )
    parser.add_argument(
        "--provider",
        choices=sorted(PROVIDERS),
        default="cpu",
        help="where ONNX Runtime runs, and with --llm the language model, also behind --engine; tensorrt is for the "
        "visual graph, the language model then runs on cuda",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="threads of one operator (default: one per core)")


def add_llm_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--llm``, what answers."""
    parser.add_argument(
        "--llm",
        metavar="ENGINE",
        default="onnxruntime",
        help="what runs the language model: onnxruntime, the bundle's decoder; transformers:DIR, a checkpoint; "
        "llamacpp:FILE.gguf; vllm:URL, a server; or vllm:DIR, vLLM in this process",
    )


def selectors_from(args: argparse.Namespace, bundle: Bundle) -> list[str] | None:
    """Return the selectors that ``--selector`` names, or ``None`` without it: the fused graph's own."""
    if args.selector is None:
        return None
    if args.selector == "all":
        precision = Precision(args.precision or next(iter(bundle.manifest.graphs)))
        return list(bundle.split_graphs(precision).selectors)
    names = list(dict.fromkeys(name.strip() for name in args.selector.split(",")))
    for name in names:
        get_selector(name)  # one that nobody knows is no matter of the bundle
    return names


def selector_from(args: argparse.Namespace, bundle: Bundle) -> str | None:
    """Return the one selector that ``--selector`` names, or ``None`` without it; refuse several."""
    names = selectors_from(args, bundle)
    if names is not None and len(names) > 1:
        raise UsageError("one run has one selector", received=args.selector, expected="a single name")
    return names[0] if names else None


def pipeline_from(args: argparse.Namespace, bundle: Bundle, *, with_llm: bool = True) -> Pipeline:
    """Return the pipeline that the options ask for; ``with`` opens it."""
    from flashvlm_export.runtime.pipeline import Pipeline

    pipeline = Pipeline.open(
        bundle,
        precision=args.precision,
        engine=args.engine,
        cuda_graphs=args.cuda_graphs,
        selectors=selectors_from(args, bundle),
        providers=PROVIDERS[args.provider],
        threads=args.threads,
        llm=args.llm if with_llm else None,
    )
    if pipeline.llm is not None and (args.positions or bundle.manifest.default_positions) == "original":
        pipeline.llm.require_gaps()
    return pipeline
