"""flashvlm report: latency and parity of a bundle against PyTorch, as one page, with checks that pass or fail."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.errors import ConfigError, ReportError, UsageError
from flashvlm_export.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm report``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--checkpoint", metavar="DIR", type=Path, required=True, help="what it was exported from, for PyTorch"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="where report.html, .md and .json are written"
    )
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="pictures (default: those inside scikit-learn and scikit-image)"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", type=Path, help="questions, one per line, dealt out to the images in turn"
    )
    parser.add_argument("--max-images", metavar="N", type=int, default=8, help="of more images, N spread evenly")
    parser.add_argument(
        "--budgets", metavar="LIST", default="128,64,32", help="visual tokens to keep; parity is judged at the first"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=20, help="of latency, that count")
    parser.add_argument("--warm-up", metavar="N", type=int, default=2, help="rounds before them")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--threads", metavar="N", type=int, help="of every backend (default: one per core)")
    parser.add_argument(
        "--eval", metavar="DIR", type=Path, help="what flashvlm eval wrote for this bundle; adds accuracy to the report"
    )
    parser.add_argument(
        "--require",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="least cosine, iou, important, coverage or answers (share of equal ones) of a precision, such as "
        "int8.iou=0.85, or "
        "with --eval the relative accuracy at a budget, such as accuracy@128=0.98; exit code 1 where one is missed",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, write the three files, and fail where a check does."""
    from flashvlm_export.calibration.photographs import (
        DEFAULT_PROMPTS,
        images_in,
        packaged_photographs,
        read_prompts,
    )
    from flashvlm_export.calibration.samples import spread
    from flashvlm_export.report.measure import ReportSettings
    from flashvlm_export.report.write import write_report

    if args.max_images < 1:
        raise UsageError("no images", received=f"--max-images {args.max_images}", expected="at least 1")
    images = images_in(args.images, args.max_images) if args.images else spread(packaged_photographs(), args.max_images)
    prompts = read_prompts(args.prompts) if args.prompts else DEFAULT_PROMPTS
    defaults = ReportSettings(args.bundle, args.checkpoint, ())
    settings = ReportSettings(
        bundle=args.bundle,
        checkpoint=args.checkpoint,
        pairs=[(image, prompts[number % len(prompts)]) for number, image in enumerate(images)],
        budgets=[_number(part, "--budgets") for part in args.budgets.split(",")],
        rounds=args.rounds,
        warm_up=args.warm_up,
        max_tokens=args.max_tokens,
        threads=defaults.threads if args.threads is None else args.threads,
        evaluation=args.eval,
        requirements=dict(_requirement(text) for text in args.require),
    )
    report = write_report(settings, args.output, Progress.on_stderr())
    if args.json:
        print_json(report)
    say = talk(args.json)
    for check in report.checks:
        say(f"{'passed' if check.passed else 'FAILED'}  {check.name} {check.measured:.4f}, at least {check.required}")
    say(f"{args.output / 'report.html'}")
    missed = [check for check in report.checks if not check.passed]
    if missed:
        raise ReportError(
            f"{len(missed)} of {len(report.checks)} checks failed",
            received="; ".join(f"{check.name} {check.measured:.4f}" for check in missed),
            expected="; ".join(f"at least {check.required}" for check in missed),
            hint="the report is written; what it asks for can be set with --require",
        )


def _number(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{option} takes whole numbers", received=repr(text), expected="numbers separated by commas, such as 128,32"
        ) from None


def _requirement(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(
            "not a requirement",
            received=repr(text if equals else name),
            expected="PRECISION.FIGURE=VALUE, such as fp16.iou=0.95",
        ) from None
