"""Telling a person how far long work has come, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Prints steps with the seconds since the start, and bars where there is a count.

    Args:
        stream: where to print; ``None`` prints nothing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._start = time.perf_counter()

    @classmethod
    def on_stderr(cls) -> Progress:
        """Return one that prints to standard error."""
        return cls(sys.stderr)

    def step(self, text: str) -> None:
        """Print that ``text`` begins now."""
        self._print(f"[{time.perf_counter() - self._start:7.1f} s] {text}")

    def note(self, text: str) -> None:
        """Print something the user has to know, such as a setting that was resolved."""
        self._print(f"            {text}")

    def bar(self, total: int, label: str, unit: str) -> tqdm[None]:
        """Return a bar to be updated and closed (a context manager)."""
        return tqdm(
            total=total,
            desc=f"            {label}",
            unit=unit,
            unit_scale=True,
            leave=False,
            file=self._stream or sys.stderr,
            disable=self._stream is None or not self._stream.isatty(),
        )

    def track(self, items: Sequence[T], unit: str) -> Iterator[T]:
        """Yield ``items`` behind a bar that counts them."""
        with self.bar(len(items), unit, unit) as bar:
            for item in items:
                yield item
                bar.update()

    def _print(self, text: str) -> None:
        if self._stream is not None:
            print(text, file=self._stream, flush=True)
