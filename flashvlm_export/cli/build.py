"""flashvlm build: turn a bundle's graph into a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.cli.pack import write
from flashvlm_export.engines import BuildSettings
from flashvlm_export.gpu import gpu_at_hand
from flashvlm_export.progress import Progress
from flashvlm_export.specs import Precision
from flashvlm_export.targets import TARGETS
from flashvlm_export.tensorrt_api import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm build``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--precision", choices=[precision.value for precision in Precision], default="fp16", help="graph to build from"
    )
    parser.add_argument(
        "--target",
        choices=sorted(TARGETS),
        help="device to build for; without it the GPU at hand, and without a GPU one portable engine (rtx)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="auto = TensorRT where it can build for the target, else TensorRT-RTX",
    )
    parser.add_argument(
        "--profile",
        metavar="RANGES",
        action="append",
        default=[],
        help="optimisation profile such as batch=1:1:4,text=1:64:256,budget=1:128:576 (minimum:optimum:maximum, in "
        "images, tokens and tokens); several are allowed; what is left out is as the graph declares it",
    )
    parser.add_argument("--workspace-mb", type=int, metavar="MB", help="most GPU scratch memory of a layer, in MB")
    parser.add_argument(
        "--optimization-level", type=int, choices=range(6), default=3, help="0 = quickest build, 5 = longest search"
    )
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="kernel timings, read and written back")
    parser.add_argument("--version-compatible", action="store_true", help="run on later releases of TensorRT too")
    parser.add_argument("--hardware-compatible", action="store_true", help="run on every GPU from Ampere on")
    parser.add_argument("--strip-weights", action="store_true", help="leave the weights to the ONNX file")
    parser.add_argument(
        "--pack", action="store_true", help="where only the device itself can build: write the archive for it instead"
    )
    parser.add_argument(
        "--for-triton", action="store_true", help="an engine for flashvlm export-triton --engine: TensorRT only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an engine of this target and precision")


def run(args: argparse.Namespace) -> None:
    """Build, and print where the engine is."""
    from flashvlm_export.export.engine_from_bundle import (
        EngineSettings,
        engine_from_bundle,
        possible_backends,
        resolve_target,
    )

    if args.pack:
        from flashvlm_export.export.pack import PackSettings

        gpu = gpu_at_hand()
        target = resolve_target(args.target, gpu)
        if not possible_backends(target, gpu):
            talk(True)(f"an engine for {target.name} has to be built on that device: this makes the archive for it")
            talk(True)("settings of the build, such as --profile, are given to ./build.sh there")
            precisions = [Precision(args.precision)]
            write(PackSettings(args.bundle, target.name, precisions=precisions, overwrite=args.overwrite), args.json)
            return
    settings = EngineSettings(
        bundle=args.bundle,
        precision=Precision(args.precision),
        target=args.target,
        backend=args.backend,
        profiles=args.profile,
        build=BuildSettings(
            workspace_bytes=None if args.workspace_mb is None else args.workspace_mb * 1_000_000,
            optimization_level=args.optimization_level,
            version_compatible=args.version_compatible,
            hardware_compatible=args.hardware_compatible,
            strip_weights=args.strip_weights,
        ),
        timing_cache=args.timing_cache,
        for_triton=args.for_triton,
        overwrite=args.overwrite,
    )
    engine = engine_from_bundle(settings, Progress.on_stderr())
    if args.json:
        print_json({"engine": str(engine.file), "sidecar": engine.entry})
        return
    entry = engine.entry
    say = talk(False)
    say(f"{engine.file}  {entry.size_bytes / 1e6:.1f} MB, {entry.build_s:.0f} s")
    say(f"next: flashvlm inspect {args.bundle}")
