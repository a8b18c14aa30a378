"""A function in a process of its own.

What is measured there finds nothing that another measurement left behind: how long PyTorch takes for large tensors, for
example, hangs on what glibc's allocator has learnt of their sizes, and a single ``torch.compile`` in the same process
changes that by a third.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from flashvlm_export.errors import FlashVLMError, WorkerError


class Worker:
    """A process that makes a function and calls it when asked; ``with`` starts and ends it.

    Args:
        make: module-level function; what it returns is called.
        arguments: of ``make``.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._other = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._other, make, arguments), daemon=True)
        self._is_made = False

    def wait(self) -> None:
        """Wait until the function is made.

        Raises:
            FlashVLMError: what making it raised; :class:`WorkerError` for anything else, or if the process ended.
        """
        if not self._is_made:
            self._receive()
            self._is_made = True

    def __call__(self, *arguments: Any) -> Any:
        """Call the function and return what it returned; raises as :meth:`wait` does."""
        return self._ask(None, arguments)

    def mean_ms(self, calls: int) -> float:
        """Return milliseconds of a call without arguments, the mean of ``calls`` in a row."""
        mean_ms: float = self._ask(calls, ())
        return mean_ms

    @property
    def peak_memory_bytes(self) -> int:
        """Largest resident memory of the process so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(dict(line.split(":", 1) for line in status.splitlines())["VmHWM"].split()[0]) * 1024

    def _ask(self, calls: int | None, arguments: tuple[Any, ...]) -> Any:
        self.wait()
        with contextlib.suppress(OSError):  # a process that has ended: receiving says so
            self._pipe.send((calls, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            is_well, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(30)
            code = self._process.exitcode
            killed = code is not None and code < 0
            raise WorkerError(
                "the process ended",
                received=f"killed by {signal.Signals(-code).name}" if code is not None and killed else f"code {code}",
                hint="where the system ran out of memory, measure fewer backends at once" if killed else None,
            ) from error
        if not is_well:
            raise answer
        return answer

    def __enter__(self) -> Worker:
        self._process.start()
        self._other.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        # One that is idle ends by itself and cleans up; on the way out of an error nobody waits for what it does.
        self._process.join(30 if kind is None else 0)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    # A quiet end, also in the middle of work, when whoever asked is gone or told to go. Bars of libraries would take a
    # semaphore of the system for a lock, which outlives a process that is killed.
    tqdm.set_lock(threading.RLock())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone: nobody is left to be told
        try:
            function = make(*arguments)
            pipe.send((True, None))
            while True:
                calls, given = pipe.recv()
                if calls is None:
                    pipe.send((True, function(*given)))
                    continue
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                pipe.send((True, (time.perf_counter() - start) * 1e3 / calls))
        except FlashVLMError as error:
            received, expected = (None if part is None else str(part) for part in (error.received, error.expected))
            # As text: what was received may be anything, and not every thing travels.
            pipe.send((False, type(error)(error.what, received=received, expected=expected, hint=error.hint)))
        except (EOFError, OSError):
            raise
        except Exception as error:  # whatever else is raised is the parent's to report
            text = f"{type(error).__name__}: {error}"
            pipe.send((False, WorkerError(text, received=traceback.format_exc())))
