"""flashvlm pack: make one archive for a device: bundle, runtime, install and build scripts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.progress import Progress
from flashvlm_export.specs import Precision
from flashvlm_export.targets import TARGETS

if TYPE_CHECKING:
    from flashvlm_export.export.pack import PackSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm pack``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument("--target", choices=sorted(TARGETS), required=True, help="device that the archive is for")
    parser.add_argument("--output", metavar="FILE", type=Path, help="archive to write (default: BUNDLE-TARGET.tar)")
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        action="append",
        default=[],
        help="visual graph to take along; repeat for several (default: all)",
    )
    parser.add_argument(
        "--offline", action="store_true", help="take the wheels of every dependency along, for a Jetson without network"
    )
    parser.add_argument(
        "--wheel", metavar="FILE", type=Path, help="wheel of flashvlm-export (default: built from the running source)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an archive that stands at FILE")


def run(args: argparse.Namespace) -> None:
    """Pack as the arguments say."""
    from flashvlm_export.export.pack import PackSettings

    settings = PackSettings(
        bundle=args.bundle,
        target=args.target,
        output=args.output,
        precisions=[Precision(name) for name in args.precision],
        offline=args.offline,
        wheel=args.wheel,
        overwrite=args.overwrite,
    )
    write(settings, args.json)


def write(settings: PackSettings, as_json: bool) -> None:
    """Write the archive, and print what to type on the device."""
    from flashvlm_export.export.pack import pack

    archive = pack(settings, Progress.on_stderr())
    if as_json:
        print_json(
            {
                "archive": str(archive.file),
                "size_bytes": archive.size_bytes,
                "sha256": archive.sha256,
                "commands": archive.commands,
            }
        )
        return
    say = talk(False)
    say(f"{archive.file}  {archive.size_bytes / 1e6:.1f} MB, SHA-256 {archive.sha256}")
    say(f"next: copy it to the device ({settings.target}) and type there:")
    for command in archive.commands:
        say(f"  {command}")
