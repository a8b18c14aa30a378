"""Results on standard output: one JSON object for machines, or text for people."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np


def print_json(value: Any) -> None:
    """Print ``value`` as one line of JSON."""
    print(msgspec.json.encode(value, enc_hook=_encode).decode())


def talk(as_json: bool) -> Callable[..., None]:
    """Return a ``print`` for people: standard output, or standard error where JSON has standard output to itself."""
    stream = sys.stderr if as_json else sys.stdout

    def say(text: str = "", end: str = "\n") -> None:
        print(text, end=end, file=stream, flush=True)

    return say


def _encode(value: object) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"cannot write {type(value).__name__} as JSON")
