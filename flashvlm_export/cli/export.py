"""flashvlm export: turn a checkpoint into a bundle with visual token selection inside its graph."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.errors import ConfigError, DependencyError, install_hint
from flashvlm_export.progress import Progress
from flashvlm_export.selection import SELECTORS
from flashvlm_export.selection.config import DIVERSITIES
from flashvlm_export.specs import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm export``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name from 'flashvlm models', hub id, or checkpoint directory; a label where --weights is a directory",
    )
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--weights",
        metavar="SOURCE",
        default="auto",
        help="checkpoint directory; auto = local Hugging Face cache, then the hub; random[:SEED] = seeded random "
        "weights at full size, for sizing and latency",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--precision", metavar="LIST", default="fp32,fp16", help="visual graphs to write, of fp32 and fp16"
    )
    parser.add_argument(
        "--selector",
        choices=list(SELECTORS),
        default="flashvlm",
        help="how visual tokens are chosen: " + "; ".join(f"{row.name} = {row.summary}" for row in SELECTORS.values()),
    )
    parser.add_argument(
        "--diversity",
        choices=DIVERSITIES,
        help="background tokens of flashvlm: bipartite = the authors' step, the default; farthest = stable under "
        "rounding",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="another setting of the selector, such as eta=0.4",
    )
    parser.add_argument(
        "--split",
        metavar="LIST",
        nargs="?",
        const="",
        help="also write encoder and selector as graphs of their own, so that an image is encoded once for many "
        "questions; LIST: further selectors to write, with commas, or all that fit (--split goes behind MODEL)",
    )
    parser.add_argument(
        "--decoder",
        choices=("auto", "none", "fp32", "fp16", "int8", "int4"),
        default="auto",
        help="LLM decoder in the bundle; auto = fp32 below a billion parameters, int4 above, none with random weights",
    )
    parser.add_argument(
        "--engine-check",
        choices=("auto", "off", "required"),
        default="auto",
        help="compile each graph with TensorRT-RTX (no GPU needed): where installed, never, or fail without it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that stands at BUNDLE")


def run(args: argparse.Namespace) -> None:
    """Export, and print where the bundle is and what was checked."""
    try:
        from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint
    except ImportError as error:
        raise DependencyError(
            "exporting needs packages that are not installed",
            received=str(error),
            hint=install_hint("export,llm"),
        ) from error
    settings = ExportSettings(
        model=args.model,
        output=args.output,
        weights=args.weights,
        revision=args.revision,
        precisions=_precisions(args.precision),
        selector=args.selector,
        selection=_settings(args.selector, args.set, args.diversity),
        split=args.split is not None,
        further_selectors=_further_selectors(args.split, args.selector),
        decoder=args.decoder,
        engine_check=args.engine_check,
        overwrite=args.overwrite,
    )
    bundle = bundle_from_checkpoint(settings, Progress.on_stderr())
    size_bytes = sum(entry.size_bytes for entry in bundle.manifest.files.values())
    if args.json:
        print_json(
            {
                "bundle": str(bundle.path),
                "size_bytes": size_bytes,
                "graphs": {name: entry.file for name, entry in bundle.manifest.graphs.items()},
                "decoder": bundle.manifest.decoder,
                "selection": bundle.manifest.selection,
                "checks": bundle.manifest.checks,
            }
        )
        return
    say = talk(False)
    say(f"{bundle.path}  {size_bytes / 1e6:.1f} MB")
    if bundle.manifest.decoder is not None and bundle.manifest.prompt is not None:
        say(f"next: flashvlm run {bundle.path} --image PHOTO --prompt 'What is in the picture?'")
    else:
        say(f"next: flashvlm inspect {bundle.path}")


def _precisions(text: str) -> list[Precision]:
    try:
        chosen = [Precision(name.strip()) for name in text.split(",") if name.strip()]
    except ValueError:
        raise ConfigError("unknown precision", received=repr(text), expected="fp32, fp16, or fp32,fp16") from None
    return list(dict.fromkeys(chosen))


def _further_selectors(text: str | None, own: str) -> list[str]:
    if not text:
        return []
    names = [name.strip() for name in text.split(",")]
    return [name for name in dict.fromkeys(names) if name != own]


def _settings(selector: str, texts: list[str], diversity: str | None) -> dict[str, str]:
    if diversity and selector != "flashvlm":
        raise ConfigError(
            "--diversity belongs to the selector 'flashvlm'",
            received=f"--selector {selector} --diversity {diversity}",
            expected="--selector flashvlm, or no --diversity",
        )
    pairs = [_setting(text) for text in texts] + ([("diversity", diversity)] if diversity else [])
    settings = dict(pairs)
    if len(settings) < len(pairs):
        raise ConfigError("a setting is given twice", received=", ".join(f"{name}={value}" for name, value in pairs))
    return settings


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ConfigError("not a setting", received=repr(text), expected="NAME=VALUE, such as eta=0.4")
    return name, value
