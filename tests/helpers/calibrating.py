"""``flashvlm calibrate`` in this process, for tests."""

from __future__ import annotations

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from flashvlm_export.cli import calibrate as verb
from flashvlm_export.cli import run_verb


def calibrate(bundle: Path, *arguments: object) -> dict[str, Any]:
    """Run the command and return what it printed as JSON, its only line; raise what it raises."""
    printed = StringIO()
    with redirect_stdout(printed):
        verb.run(_parsed(bundle, *arguments, "--json"))
    (line,) = printed.getvalue().splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


def exit_code(bundle: Path, *arguments: object) -> int:
    """Run the command as a user does and return its exit code."""
    return run_verb("flashvlm calibrate", verb.run, _parsed(bundle, *arguments))


def _parsed(bundle: Path, *arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args([str(bundle), *map(str, arguments)])
