"""flashvlm models: list the models that can be exported."""

from __future__ import annotations

import argparse

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.models import FAMILIES, MODELS, outside_families


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the verb has no arguments of its own."""


def run(args: argparse.Namespace) -> None:
    """Print the registry."""
    if args.json:
        fields = ("name", "repo", "family", "visual_tokens", "parameters")
        families = {name: {"takes": row.takes, "state": row.state} for name, row in FAMILIES.items()}
        print_json(
            {
                "models": [{name: getattr(entry, name) for name in fields} for entry in MODELS.values()],
                "families": families | {name: {"adapter": point.value} for name, point in outside_families().items()},
            }
        )
        return
    say = talk(False)
    say(f"{'MODEL':<24}{'FAMILY':<17}{'VISUAL TOKENS':<16}{'PARAMETERS':<13}CHECKPOINT")
    for entry in MODELS.values():
        size = f"{entry.parameters:.1f} B" if entry.parameters >= 0.1 else f"{entry.parameters * 1e3:.1f} M"
        say(f"{entry.name:<24}{entry.family:<17}{entry.visual_tokens:<16}{size:<13}{entry.repo}")
    say(f"\n{'FAMILY':<17}{'TAKES':<16}STATE")
    for name, family in FAMILIES.items():
        say(f"{name:<17}{family.takes:<16}{family.state}")
    for name, point in outside_families().items():
        say(f"{name:<17}{'':16}adapter of another package: {point.value}")
    say("\nAny checkpoint directory of one of these families can be exported too: flashvlm export DIR --output BUNDLE")
