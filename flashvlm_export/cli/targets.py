"""flashvlm targets: list the devices that engines are built for."""

from __future__ import annotations

import argparse

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.targets import TARGETS, find_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm targets``."""
    parser.add_argument("name", metavar="NAME", nargs="*", help="only these")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    chosen = [find_target(name) for name in args.name] or list(TARGETS.values())
    if args.json:
        print_json({"targets": chosen})
        return
    say = talk(False)
    say(f"{'TARGET':<12}{'COMPUTE CAPABILITY':<20}{'MEMORY':<9}{'SOFTWARE':<28}DEVICES")
    for target in chosen:
        jetpack = target.jetpack
        software = f"JetPack {jetpack.version}, TensorRT {jetpack.tensorrt}" if jetpack else ""
        memory = f"{target.memory_gb} GB"
        say(f"{target.name:<12}{target.capabilities:<20}{memory:<9}{software:<28}{target.devices}")
