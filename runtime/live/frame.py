"""A frame of a source, and what every source of frames is."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

#: Seconds on a clock that never goes back, as :func:`time.monotonic`.
Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame, which may never be looked at.

    Attributes:
        captured_s: when the source handed it over, by the source's clock. What a camera or a network needed before that
            is not in it.
        decode: returns it as an upright 8-bit RGB picture. Most frames are dropped, so that turning one into a picture
            is left to whoever asks about it; safe from another thread, once.
    """

    captured_s: float
    decode: Callable[[], Image.Image]


class Source(ABC):
    """Where frames come from. Constructing one checks what it can without opening anything.

    Attributes:
        name: for people; passwords in addresses are left out.
        reconnects: whether it breaks off rather than ends, so that it is worth being opened again.
    """

    name: str
    reconnects: ClassVar[bool] = False

    @abstractmethod
    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """Open the source and yield frames as they come, until it ends or ``stop`` is set; closing it ends it too.

        Raises:
            VideoError: if it cannot be opened, breaks off, or holds broken frames.
            DependencyError: if what reads it is not installed.
        """
