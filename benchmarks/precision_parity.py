"""How like PyTorch each precision and backend of a bundle is: visual tokens and kept sets on real photographs.

The reference is transformers' own model in float32 and the NumPy definition of the selection; nothing of the exported
graph is in it. Every graph of the bundle runs in ONNX Runtime on each execution provider there is; every engine of the
bundle that this machine's GPU can run, runs too, and those that it cannot are named. Visual tokens are compared before
pruning (a run that keeps all), so that row i means patch i everywhere; kept sets at ``--budget``.

Images are the photographs inside scikit-learn and scikit-image, or ``--images``; each is asked one of calibration's
default questions. With ``diversity: bipartite`` the whole kept set hangs on rounding (docs/selection.md): look at the
important part and at coverage.

A missed target is printed, not an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from flashvlm_export.bundle import Bundle
from flashvlm_export.calibration.likeness import compare
from flashvlm_export.calibration.photographs import DEFAULT_PROMPTS, images_in, packaged_photographs
from flashvlm_export.calibration.readings import Reading
from flashvlm_export.engines import list_engines
from flashvlm_export.errors import FlashVLMError
from flashvlm_export.export.reference import LlavaReference
from flashvlm_export.progress import Progress
from flashvlm_export.runtime.graph_inputs import GraphInputs
from flashvlm_export.runtime.sessions.base import VisualSession
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.runtime.sessions.tensorrt import TensorRTSession
from flashvlm_export.selection import get_selector, select_tokens
from flashvlm_export.selection.flashvlm_numpy import fused_score, text_relevance
from flashvlm_export.specs import Array, Precision

# Cosine and IoU of the kept set that a precision has to reach.
TARGETS = {"fp16": (0.999, 0.97), "int8": (0.99, 0.90)}
MOST_IMAGES = 64


def sessions(bundle: Bundle) -> Iterator[tuple[str, str, VisualSession]]:
    """Yield backend, precision and session of all that may run; opening one shows whether it does."""
    import onnxruntime

    graphs = bundle.manifest.graphs
    for provider in onnxruntime.get_available_providers():
        if provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
            for name, graph in graphs.items():
                session = OnnxRuntimeSession(bundle.graph_file(Precision(name)), graph.spec, providers=(provider,))
                yield f"ONNX Runtime {provider.removesuffix('ExecutionProvider')}", name, session
    for engine in list_engines(bundle):
        entry = engine.entry
        yield f"{entry.backend} {entry.target}", entry.precision, TensorRTSession(bundle, engine)


class References:
    """What PyTorch makes of each image with its question."""

    def __init__(self, bundle: Bundle, checkpoint: Path, images: list[Path], budget: int) -> None:
        model, inputs = LlavaReference(checkpoint), GraphInputs(bundle)
        selection = bundle.manifest.selection
        self.config: Any = get_selector(selection.selector).make_config(selection.config)
        self.feeds: list[dict[str, Array]] = []
        self.readings: list[Reading] = []
        for number, image in enumerate(Progress.on_stderr().track(images, "images in PyTorch")):
            rows = inputs.text_rows(DEFAULT_PROMPTS[number % len(DEFAULT_PROMPTS)], Precision.FP32)
            feeds = inputs.feeds(image, rows, budget)
            features, saliency, tokens = model.encode(feeds["pixel_values"])
            text, mask = feeds["text_embeds"], feeds["text_mask"]
            kept = select_tokens(features, saliency, tokens, text, mask, budget, self.config)
            relevance = text_relevance(tokens[0].astype(np.float64), text[0].astype(np.float64), self.config)
            scores = fused_score(saliency[0].astype(np.float64), relevance, self.config)
            self.feeds.append(feeds)
            self.readings.append(Reading(tokens[0], features[0], kept[0], scores))


def read(session: VisualSession, references: References, precision: str) -> list[Reading]:
    """Return what an open session makes of the same inputs."""
    readings = []
    for feeds, want in zip(references.feeds, references.readings, strict=True):
        given = {**feeds, "text_embeds": feeds["text_embeds"].astype(Precision(precision).float_dtype)}
        kept = session.run(given)
        everything = session.run({**given, "budget": np.array(len(want.scores))})
        readings.append(
            Reading(everything.tokens[0].astype(np.float32), want.features, kept.indices[0], kept.scores[0])
        )
    return readings


def mean_error(want: list[Reading], have: list[Reading]) -> float:
    """Return the mean absolute error of all visual tokens, by Polygraphy."""
    results = [
        IterationResult({"tokens": np.concatenate([reading.tokens for reading in readings])})
        for readings in (have, want)
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return float(SimpleCompareFunc(check_error_stat="mean")(*results)["tokens"].mean_absdiff)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help="what the bundle was exported from")
    parser.add_argument("--budget", type=int, default=128, help="visual tokens to keep")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: the packaged ones)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle, verify=True)
    images = images_in(args.images, MOST_IMAGES) if args.images else packaged_photographs()
    references = References(bundle, args.checkpoint, images, args.budget)
    important = int(references.config.important_ratio * args.budget)
    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    titles = ("cosine", "worst", "max error", "mean error", "IoU", "important", "coverage")
    print(f"{'backend':32}{'graph':>6}" + "".join(f"{title:>12}" for title in titles), file=sys.stderr)
    for backend, precision, session in sessions(bundle):
        try:
            with session:
                readings = read(session, references, precision)
        except FlashVLMError as error:
            not_run[f"{backend} {precision}"] = error.what
            continue
        like = compare(references.readings, readings, important)
        figures = {**vars(like), "mean_error": mean_error(references.readings, readings)}
        rows.append({"backend": backend, "precision": precision, **figures})
        cosine, iou = TARGETS.get(precision, (0.0, 0.0))
        is_stable = references.config.diversity == "farthest"
        missed = like.cosine < cosine or (is_stable and like.iou < iou)
        shown = ("cosine", "worst_token_cosine", "max_error", "mean_error", "iou", "important_iou", "coverage")
        print(
            f"{backend:32}{precision:>6}"
            + "".join(f"{figures[name]:12.2e}" if "error" in name else f"{figures[name]:12.5f}" for name in shown)
            + ("  MISSED" if missed else ""),
            file=sys.stderr,
            flush=True,
        )
    for name, reason in not_run.items():
        print(f"not run: {name}: {reason}", file=sys.stderr)
    result = {
        "benchmark": "precision_parity",
        "diversity": references.config.diversity,
        "budget": args.budget,
        "images": [image.name for image in images],
        "rows": rows,
        "not_run": not_run,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
