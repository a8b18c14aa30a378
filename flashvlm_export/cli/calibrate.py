"""flashvlm calibrate: add an INT8 graph to a bundle, with activation ranges from photographs."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.errors import ConfigError, DependencyError, UsageError, install_hint
from flashvlm_export.files import sha256_of
from flashvlm_export.progress import Progress
from flashvlm_export.specs import Precision

if TYPE_CHECKING:
    from flashvlm_export.calibration.likeness import Tolerance
    from flashvlm_export.calibration.samples import Sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm calibrate``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="bundle with an fp16 graph")
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=Path,
        help="photographs like those of use, some dozen (default: those inside scikit-learn and scikit-image)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="questions that guide selection while the result is judged, one per line, dealt out to the images in "
        "turn; needs --images (default: eight common questions)",
    )
    parser.add_argument(
        "--method",
        choices=("minmax", "entropy", "percentile"),
        default="minmax",
        help="how an activation's range is chosen: its extremes, least divergence, or clipping the rarest values",
    )
    parser.add_argument(
        "--percentile",
        metavar="P",
        type=float,
        help="percent of magnitudes that --method percentile does not clip (default: 99.999)",
    )
    parser.add_argument("--max-images", metavar="N", type=int, default=128, help="of more images, N spread evenly")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and count them")
    parser.add_argument(
        "--tolerance",
        metavar="LIST",
        default="auto",
        help="what must hold against the float graph, or the worst layers stay in float16 until it does; auto = "
        "cosine=0.99,iou=0.9 (or one token),coverage=0.97, the cosine alone with random weights; "
        "none = every layer becomes INT8",
    )
    parser.add_argument(
        "--budget",
        metavar="K",
        type=int,
        help="visual tokens kept while judging (default: what the graph is optimised for, at most half of all)",
    )
    parser.add_argument("--max-layers", metavar="N", type=int, default=32, help="layers to rank; more are joined")
    parser.add_argument(
        "--sensitivity-images", metavar="N", type=int, default=2, help="images each layer is measured on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the INT8 graph that the bundle has")


def run(args: argparse.Namespace) -> None:
    """Calibrate, and print the figures."""
    try:
        from flashvlm_export.calibration.calibrate import (
            CalibrationSettings,
            calibrate,
            default_budget,
            default_tolerance,
            require_calibratable,
        )
    except ImportError as error:
        raise DependencyError(
            "calibration needs packages that are not installed",
            received=str(error),
            hint=install_hint("export"),
        ) from error
    for name in ("max_images", "max_layers", "sensitivity_images"):
        if getattr(args, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is out of range", received=getattr(args, name), expected="1 or more"
            )
    if args.percentile is not None and args.method != "percentile":
        raise UsageError(
            "--percentile belongs to another method",
            received=f"--percentile {args.percentile:g} --method {args.method}",
            expected="--method percentile with it",
        )
    bundle = Bundle.open(args.bundle)
    require_calibratable(bundle, overwrite=args.overwrite)
    budget = default_budget(bundle) if args.budget is None else args.budget
    settings = CalibrationSettings(
        method=args.method,
        percentile=CalibrationSettings.percentile if args.percentile is None else args.percentile,
        tolerance=default_tolerance(bundle, budget) if args.tolerance == "auto" else _tolerance(args.tolerance),
        budget=budget,
        most_layers=args.max_layers,
        sensitivity_images=args.sensitivity_images,
        overwrite=args.overwrite,
    )
    progress = Progress.on_stderr()
    samples, skipped = _samples(args, bundle, settings.budget, progress)
    result = calibrate(bundle, samples, settings, progress)
    checks = result.bundle.manifest.checks["int8"]
    if args.json:
        print_json(
            {
                "bundle": str(bundle.path),
                "graph": result.bundle.manifest.graphs["int8"].file,
                "images": len(samples),
                "skipped_images": skipped,
                "settings": asdict(settings),
                "excluded_layers": result.sensitivity.excluded,
                "likeness": asdict(result.likeness),
                "checks": checks,
            }
        )
        return
    say = talk(False)
    if skipped:
        say(f"{len(skipped)} image(s) skipped: {', '.join(skipped)}")
    say(
        f"{bundle.path}: INT8 graph with {checks['census']['int8_products']:.0f} INT8 matrix products, "
        f"{checks['census']['float_products']:.0f} in float16"
    )
    say(f"next: flashvlm run {bundle.path} --precision int8 --image PHOTO --prompt 'What is in the picture?'")


def _samples(
    args: argparse.Namespace, bundle: Bundle, budget: int, progress: Progress
) -> tuple[list[Sample], list[str]]:
    """Return what to calibrate with, and the images left out."""
    from flashvlm_export.calibration.photographs import (
        DEFAULT_PROMPTS,
        images_in,
        packaged_photographs,
        read_prompts,
        readable,
    )
    from flashvlm_export.calibration.samples import Sample, combined_key
    from flashvlm_export.runtime.graph_inputs import GraphInputs
    from flashvlm_export.runtime.images import load_image

    if args.prompts is not None and args.images is None:
        raise UsageError(
            "prompts without images",
            received=f"--prompts {args.prompts}",
            expected="--images DIR beside it: prompts alone give no ranges",
        )
    inputs = GraphInputs(bundle)
    prompts = list(DEFAULT_PROMPTS) if args.prompts is None else read_prompts(args.prompts)
    if args.prompts is not None or inputs.prompts is not None:
        rows = [inputs.text_rows(prompt, Precision.FP16) for prompt in prompts]
    else:
        prompts = [f"random rows {seed}" for seed in range(len(prompts))]
        rows = [inputs.random_text_rows(seed, Precision.FP16) for seed in range(len(prompts))]
        progress.note("NOTE: the bundle has no tokenizer: random rows of its embedding table stand in for questions")
    images = packaged_photographs() if args.images is None else images_in(args.images, args.max_images)
    good, skipped = readable(images, load_image, skip_bad=args.skip_bad, progress=progress)
    for reason in skipped:
        progress.note(f"skipped {reason}")
    if len(prompts) > len(good) and args.prompts is not None:
        progress.note(
            f"NOTE: {len(prompts) - len(good)} of {len(prompts)} prompts are not used, one goes to each image"
        )

    def sample(number: int, path: Path) -> Sample:
        text = number % len(prompts)
        return Sample(
            path.name,
            combined_key([sha256_of(path), prompts[text]]),
            lambda: inputs.feeds(path, rows[text], budget),
        )

    return [sample(number, path) for number, path in enumerate(good)], skipped


def _tolerance(text: str) -> Tolerance | None:
    from flashvlm_export.calibration.likeness import Tolerance

    if text == "none":
        return None
    names = [field.name for field in fields(Tolerance)]
    values = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            if name not in names or name in values:
                raise ValueError
            values[name] = float(value)
        except ValueError:
            raise ConfigError(
                "not a tolerance",
                received=repr(text),
                expected=f"auto, none, or {', '.join(f'{name}=0..1' for name in names)}, each at most once",
            ) from None
    return Tolerance(**values)
