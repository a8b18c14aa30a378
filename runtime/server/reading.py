"""Threads that read requests: pictures are decoded there and prompts tokenised, away from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from anyio import Semaphore

from flashvlm_export.runtime.server.api_errors import LATER, ApiError

B = TypeVar("B")
T = TypeVar("T")

# Each takes the memory of decoded pictures, and a core.
_THREADS = 2


class Reading(Generic[B, T]):
    """Reads so many requests at a time.

    Args:
        read: blocks; runs on one of the threads.
        max_waiting: requests that wait for a thread; one more is refused.
    """

    def __init__(self, read: Callable[[B], T], max_waiting: int) -> None:
        self._read, self._max_waiting = read, max_waiting
        self._free = Semaphore(_THREADS)
        self._threads = ThreadPoolExecutor(_THREADS, "flashvlm-reading")

    async def __call__(self, body: B) -> T:
        """Return what ``body`` says.

        May be cancelled at any time. A thread that is at work for it then goes on to its end, and is not free before.

        Raises:
            ApiError: if too many wait.
        """
        if self._free.statistics().tasks_waiting >= self._max_waiting:
            raise ApiError(503, "too many requests are waiting", code="overloaded", kind="server_error", headers=LATER)
        await self._free.acquire()
        loop = asyncio.get_running_loop()

        def release(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(self._free.release)

        future = self._threads.submit(self._read, body)
        future.add_done_callback(release)
        return await asyncio.wrap_future(future)
