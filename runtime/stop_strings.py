"""Texts that end an answer, while it streams."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a text that comes in pieces off before the first of some strings, which is the one that ends first.

    What may be the beginning of one is held back until it is known. How the text is cut into pieces does not matter.

    Args:
        strings: none of them empty; no string, no cut.

    Attributes:
        found: one of them came; everything from it on is dropped.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Return what of the text is known to stay; may be empty."""
        if self.found:
            return ""
        text = self._held + piece
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        self.found = bool(found)
        begun = (
            n
            for string in self._strings
            for n in range(1, min(len(string), len(text) + 1))
            if text.endswith(string[:n])
        )
        stays = min(found)[1] if found else len(text) - max(begun, default=0)
        self._held = "" if self.found else text[stays:]
        return text[:stays]

    def flush(self) -> str:
        """Return what was held back; to be called once, after the last piece."""
        held, self._held = self._held, ""
        return held
