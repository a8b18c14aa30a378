"""flashvlm inspect: show what a bundle holds, and check that it is whole."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.engines import check_engine, list_engines
from flashvlm_export.profiles import format_profile
from flashvlm_export.specs import TensorSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm inspect``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--verify", action="store_true", help="hash every file; without it, sizes, and hashes up to 64 MiB"
    )


def run(args: argparse.Namespace) -> None:
    """Open the bundle and print its manifest."""
    bundle = Bundle.open(args.bundle, verify=args.verify)
    manifest, engines = bundle.manifest, [*list_engines(bundle), *list_engines(bundle, for_triton=True)]
    for engine in engines:
        check_engine(bundle, engine, verify=args.verify)
    if args.json:
        print_json(
            {
                "bundle": str(bundle.path),
                "verified": bool(args.verify),
                "manifest": manifest,
                "engines": [engine.entry for engine in engines],
            }
        )
        return
    say, dims = talk(False), manifest.dims
    say(f"{bundle.path}: whole" + (", every hash verified" if args.verify else ""))
    say(f"  model      {manifest.source.model} ({manifest.source.family}), weights: {manifest.source.weights}")
    say(f"  visual     {dims.describe_pictures()}, widths {dims.vision_width} → {dims.llm_width}")
    settings = ", ".join(f"{name}={value}" for name, value in manifest.selection.config.items())
    say(f"  selection  {manifest.selection.selector}: {settings}")
    decoder = manifest.decoder
    say(f"  decoder    {f'{decoder.precision}, up to {decoder.max_positions} positions' if decoder else 'none'}")
    for name, graph in manifest.graphs.items():
        say(f"  graph {name}: {graph.file}")
        for tensor in (*graph.spec.inputs, *graph.spec.outputs):
            say(f"    {'in ' if tensor in graph.spec.inputs else 'out'} {_tensor(tensor)}")
        for dim in graph.spec.dims:
            say(f"    {dim.name}: {dim.min} to {dim.max}, optimised for {dim.opt}")
        for check, measured in manifest.checks.get(name, {}).items():
            say(f"    {check}: " + ", ".join(f"{key} {value:.3g}" for key, value in measured.items()))
    for engine in engines:
        entry = engine.entry
        say(f"  engine {entry.target} {entry.precision}: {engine.file.relative_to(bundle.path)}")
        size = f"{entry.size_bytes / 1e6:.1f} MB"
        say(f"    {entry.backend} {entry.backend_version}, {size}, built in {entry.build_s:.0f} s")
        if entry.compute_capabilities:
            say(f"    compute capability {', '.join(entry.compute_capabilities)}")
        for profile in entry.profiles:
            say(f"    profile {format_profile(tuple(profile))}")
        say("    layer outputs by dtype: " + _by_dtype(entry.census))
    for name, file in sorted(manifest.files.items()):
        say(f"  {file.size_bytes / 1e6:10.2f} MB  {name}")
    say("  written by " + ", ".join(f"{name} {version}" for name, version in manifest.tools.items()))


def _by_dtype(census: dict[str, int]) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for name, count in census.items():
        counts[name.rpartition(" ")[2]] += count
    return ", ".join(f"{dtype} {count}" for dtype, count in counts.most_common())


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name:<15} {tensor.dtype:<8} {list(tensor.shape)}"
