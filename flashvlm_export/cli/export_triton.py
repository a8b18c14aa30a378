"""flashvlm export-triton: write a model repository for Triton Inference Server."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.progress import Progress
from flashvlm_export.specs import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm export-triton``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--output",
        metavar="REPO",
        type=Path,
        required=True,
        help="the model repository, what tritonserver --model-repository names; its other models are left alone",
    )
    parser.add_argument("--name", default="flashvlm", help="of the model, as clients call it")
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        help="visual graph to serve (default: the bundle's first; with --engine, the engine's)",
    )
    parser.add_argument(
        "--engine",
        metavar="TARGET",
        nargs="?",
        const="auto",
        help="serve the bundle's engine for TARGET, of flashvlm build --for-triton, with Triton's TensorRT backend "
        "(without a name: its only one, or the one for the GPU at hand); without --engine, ONNX Runtime runs the graph",
    )
    parser.add_argument(
        "--max-batch",
        metavar="N",
        type=int,
        help="most images that Triton runs together (default: what the graph declares, or the engine was built for)",
    )
    parser.add_argument(
        "--max-queue-delay-us",
        metavar="US",
        type=int,
        default=0,
        help="microseconds that a request waits for company; 0 puts together what has to wait anyway",
    )
    parser.add_argument(
        "--instances", metavar="N", type=int, default=1, help="copies of the model on each GPU, or on the processor"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace config.pbtxt and version 1 of an earlier run, edited or not"
    )


def run(args: argparse.Namespace) -> None:
    """Write the model, and print how to serve it."""
    from flashvlm_export.export.triton_repository import TritonSettings, triton_repository

    settings = TritonSettings(
        bundle=args.bundle,
        output=args.output,
        name=args.name,
        precision=None if args.precision is None else Precision(args.precision),
        engine=args.engine,
        max_batch=args.max_batch,
        max_queue_delay_us=args.max_queue_delay_us,
        instances=args.instances,
        overwrite=args.overwrite,
    )
    model = triton_repository(settings, Progress.on_stderr())
    command = f"tritonserver --model-repository={shlex.quote(str(args.output.resolve()))}"
    if args.json:
        print_json(
            {
                "model": str(model.directory),
                "backend": model.backend,
                "backend_version": model.backend_version,
                "precision": model.precision,
                "max_batch": model.max_batch,
                "files": model.files,
                "command": command,
            }
        )
        return
    say = talk(False)
    for name, size_bytes in model.files.items():
        say(f"{size_bytes / 1e6:10.2f} MB  {name}")
    if model.backend_version is not None:
        say(f"serve it with a release of Triton that has TensorRT {model.backend_version}")
    say(f"next: {command}")
