"""How a benchmark ends: one JSON line on standard output, and the same in a file where one is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finish(result: Mapping[str, Any], file: Path | None) -> None:
    """Print ``result``, and write it to ``file``."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
