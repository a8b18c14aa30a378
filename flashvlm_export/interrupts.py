"""Ctrl-C and SIGTERM during calls into libraries that swallow exceptions.

torch's tracer, stopped at the wrong moment, goes on or fails in its own way. So the command remembers that it was
interrupted, and asks after such a call.
"""

from __future__ import annotations

import signal
from types import FrameType

_interrupted = False


def install() -> None:
    """Let Ctrl-C, and what service managers and containers send to stop a process, raise KeyboardInterrupt."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def check() -> None:
    """Raise KeyboardInterrupt if one of the signals has come, whatever became of the exception that it raised."""
    if _interrupted:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt
