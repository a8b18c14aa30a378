"""A place for one value, the newest: writers never wait, readers wait for what they have not seen."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Newest(Generic[T]):
    """Holds the newest value for any number of readers and writers in any threads.

    Values are numbered from 1. A reader that is slower than the writer finds from the number how many it missed:
    nothing is ever queued for it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: tuple[int, T] | None = None
        self._closed = False

    @property
    def number(self) -> int:
        """The number of the newest value, which is how many there were; 0 before the first."""
        return 0 if self._held is None else self._held[0]

    @property
    def closed(self) -> bool:
        """Whether no more values come."""
        return self._closed

    def put(self, value: T) -> None:
        """Replace what is there, whether it was read or not; after :meth:`close`, do nothing."""
        with self._changed:
            if not self._closed:
                self._held = self.number + 1, value
                self._changed.notify_all()

    def close(self) -> None:
        """Let readers know that no more values come; the newest can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, after: int = 0, timeout_s: float | None = None) -> tuple[int, T] | None:
        """Return number and value of the newest as soon as its number is above ``after``.

        ``None`` if none came in time, or the place was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.number > after or self._closed, timeout_s)
            return self._held if self.number > after else None

    def wait_end(self, after: int, timeout_s: float) -> None:
        """Wait until nothing above ``after`` is there or will come, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed and self.number <= after, timeout_s)
