"""Functions that are measured in turn, each in a process of its own.

Other load on the machine hits all of them alike, so that their ratios hold; and none finds what another left behind:
how long PyTorch takes for large tensors, for example, hangs on what glibc's allocator has learnt of their sizes, and a
single ``torch.compile`` in the same process changes that by a third.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from flashvlm_export.errors import FlashVLMError

# A function that returns sooner than this is called several times in a row.
_SHORTEST_MS = 300.0


class Worker:
    """A process that makes a function and calls it when asked.

    Args:
        make: module-level function; what it returns is called.
        arguments: of ``make``.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function and return what it returned.

        Raises:
            FlashVLMError: the one that the function, or its making, raised.
            RuntimeError: with the traceback of anything else.
        """
        return self._ask(None, arguments)

    def mean_ms(self, calls: int) -> float:
        """Return milliseconds of a call without arguments, the mean of ``calls`` in a row."""
        mean_ms: float = self._ask(calls, ())
        return mean_ms

    def _ask(self, calls: int | None, arguments: tuple[Any, ...]) -> Any:
        try:
            self._pipe.send((calls, arguments))
            is_well, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join(30)
            raise RuntimeError(f"the process ended: exit code {self._process.exitcode}") from error
        if is_well:
            return answer
        raise answer if isinstance(answer, FlashVLMError) else RuntimeError(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(30)
        self._process.kill()


def _serve(pipe: Connection, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    try:
        function = make(*arguments)
        while True:
            calls, given = pipe.recv()
            if calls is None:
                pipe.send((True, function(*given)))
                continue
            start = time.perf_counter()
            for _ in range(calls):
                function()
            pipe.send((True, (time.perf_counter() - start) * 1e3 / calls))
    except (EOFError, KeyboardInterrupt):
        pass  # the parent is gone, or going
    except FlashVLMError as error:
        pipe.send((False, error))
    except Exception:  # whatever else is raised is the parent's to report
        pipe.send((False, traceback.format_exc()))


def take_turns(workers: Mapping[str, Worker], repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of ``repeats`` rounds per worker, in an order that rotates, after one that does not count.

    A short function runs several times in a row, and its mean counts: inside a graph it finds its inputs in the cache
    and the threads awake, which a single call after another variant's seconds does not.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in workers}
    calls = dict.fromkeys(workers, 1)
    names = list(workers)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            mean_ms = workers[name].mean_ms(calls[name])
            if turn:
                times_ms[name].append(mean_ms)
            else:
                calls[name] = 1 + int(_SHORTEST_MS / mean_ms)
    return times_ms
