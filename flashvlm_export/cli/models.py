"""flashvlm models: list the models that can be exported."""

from __future__ import annotations

import argparse

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.models import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the verb has no arguments of its own."""


def run(args: argparse.Namespace) -> None:
    """Print the registry."""
    if args.json:
        fields = ("name", "repo", "family", "visual_tokens", "parameters")
        print_json({"models": [{name: getattr(entry, name) for name in fields} for entry in MODELS.values()]})
        return
    say = talk(False)
    say(f"{'MODEL':<24}{'FAMILY':<12}{'VISUAL TOKENS':<16}{'PARAMETERS':<13}CHECKPOINT")
    for entry in MODELS.values():
        size = f"{entry.parameters:.1f} B" if entry.parameters >= 0.1 else f"{entry.parameters * 1e3:.1f} M"
        say(f"{entry.name:<24}{entry.family:<12}{entry.visual_tokens:<16}{size:<13}{entry.repo}")
    say("\nAny checkpoint directory of one of these families can be exported too: flashvlm export DIR --output BUNDLE")
