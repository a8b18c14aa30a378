"""flashvlm dataset: make a data set for flashvlm eval from your copy of a published benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.evaluation.convert.registry import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm dataset``."""
    parser.add_argument(
        "format",
        metavar="FORMAT",
        help="; ".join(f"{name}: {entry.summary}" for name, entry in FORMATS.items()),
    )
    parser.add_argument("--questions", metavar="PATH", type=Path, required=True, help="published file, see FORMAT")
    parser.add_argument("--annotations", metavar="FILE", type=Path, help="its answers, where they are in another file")
    parser.add_argument("--images", metavar="DIR", type=Path, help="the benchmark's images (mmbench: written there)")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, required=True, help="data set to write, such as gqa.jsonl"
    )
    parser.add_argument("--split", metavar="NAME", default="test", help="scienceqa: which part")
    parser.add_argument("--kind", metavar="NAME", help="kind of all questions (default: by FORMAT)")
    parser.add_argument(
        "--instruction",
        metavar="TEXT",
        help="last line of every question; '' for none (default: what LLaVA-1.5 was trained with for such answers)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> None:
    """Convert, check and write."""
    from flashvlm_export.evaluation.convert.common import Source
    from flashvlm_export.evaluation.convert.registry import convert

    source = Source(
        questions=args.questions,
        annotations=args.annotations,
        images=args.images,
        output=args.output,
        split=args.split,
        kind=args.kind,
        instruction=args.instruction,
    )
    written = convert(args.format, source, overwrite=args.overwrite)
    if args.json:
        print_json(
            {
                "data": str(args.output),
                "format": args.format,
                "questions": written.questions,
                "kinds": written.kinds,
                "left_out": written.left_out,
            }
        )
        return
    say = talk(False)
    say(f"{args.output}: {written.questions} questions")
    for kind, count in written.kinds.items():
        say(f"  {kind}: {count}")
    for reason, count in written.left_out.items():
        say(f"  left out: {count} ({reason})")
    say(f"next: flashvlm eval BUNDLE --data {args.output} --output DIR")
