"""Ctrl-C and SIGTERM during calls into libraries that swallow exceptions.

torch's tracer, stopped at the wrong moment, goes on or fails in its own way. So the command remembers that it was
interrupted, and asks after such a call.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

_interrupted = False
_report_others: Callable[[sys.UnraisableHookArgs], object] = sys.__unraisablehook__


def install() -> None:
    """Let Ctrl-C, and what service managers and containers send to stop a process, raise KeyboardInterrupt.

    A signal that the process was started to ignore, as a shell does for its background jobs, stays ignored. Only the
    main thread may set handlers; elsewhere this does nothing.
    """
    global _interrupted
    _interrupted = False
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
    if sys.unraisablehook is not _report_unraisable:
        global _report_others
        _report_others, sys.unraisablehook = sys.unraisablehook, _report_unraisable


def check() -> None:
    """Raise KeyboardInterrupt if one of the signals has come, whatever became of the exception that it raised."""
    if _interrupted:
        raise KeyboardInterrupt


def settle() -> None:
    """Let the process end with its own exit code after a KeyboardInterrupt was caught.

    CPython notes a KeyboardInterrupt that passes through ``exec`` of a text, as dataclasses and torch's tracer run it;
    ``python -m`` then dies of SIGINT when it would exit, whoever caught the exception further out. The next ``exec``
    forgets it.
    """
    exec("")


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Be silent about an interruption that hit a destructor, where Python cannot raise it: it is remembered."""
    if unraisable.exc_type is not KeyboardInterrupt:
        _report_others(unraisable)
