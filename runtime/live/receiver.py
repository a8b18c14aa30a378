"""A thread that reads a source and keeps its newest frame; sources that break off are opened again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from types import TracebackType

from flashvlm_export.errors import VideoError
from flashvlm_export.runtime.live.frame import Frame, Source
from flashvlm_export.runtime.live.newest import Newest

#: Seconds before a source that broke off is opened again; the last one again and again.
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
# A source that does not look at its stop event, since its driver holds it, is left behind after so long.
_LONGEST_CLOSE_S = 3.0


class Receiver:
    """Reads ``source`` on a thread of its own, from ``with`` on.

    A source has to open the first time: what is wrong then is a mistake that waiting does not mend. A live one that
    breaks off later is opened again, for as long as it takes.

    Args:
        source: opened by the thread.
        on_event: hears in words what happens to the connection, on the thread.
        pauses_s: seconds before the first, second, … attempt to open it again; frames that come begin anew.

    Attributes:
        newest: the newest frame; closed when there are no more.
        reconnects: how often the source was opened again and delivered.
        error: what ended it, if anything did.
    """

    def __init__(
        self, source: Source, *, on_event: Callable[[str], object], pauses_s: Sequence[float] = PAUSES_S
    ) -> None:
        self.source = source
        self.newest: Newest[Frame] = Newest()
        self.reconnects = 0
        self.error: BaseException | None = None
        self._on_event, self._pauses_s = on_event, pauses_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="flashvlm-receiver", daemon=True)
        self._first_s = self._last_s = 0.0

    @property
    def fps(self) -> float | None:
        """Frames per second over all that came, interruptions included; ``None`` of fewer than two."""
        count, seconds = self.newest.number, self._last_s - self._first_s
        return (count - 1) / seconds if count > 1 and seconds > 0 else None

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self.newest.close()
        if self._thread.is_alive():
            self._thread.join(_LONGEST_CLOSE_S)

    def _work(self) -> None:
        try:
            self._receive()
        except BaseException as error:  # whatever it is, whoever waits for frames has to hear of it
            self.error = error
        finally:
            self.newest.close()

    def _receive(self) -> None:
        failures = 0
        while not self._stop.is_set():
            came = self.newest.number
            try:
                with closing(self.source.frames(self._stop)) as frames:
                    for frame in frames:
                        if failures:
                            self.reconnects += 1
                            self._on_event(f"connected again: {self.source.name}")
                            failures = 0
                        self._take(frame)
                        if self._stop.is_set():
                            return
                return
            except VideoError as error:
                if not self.source.reconnects or not self.newest.number or self._stop.is_set():
                    raise
                failures = 1 if self.newest.number > came else failures + 1
                pause_s = self._pauses_s[min(failures, len(self._pauses_s)) - 1]
                self._on_event(f"{error.what}: {error.received}; trying again in {pause_s:g} s")
                self._stop.wait(pause_s)

    def _take(self, frame: Frame) -> None:
        if not self.newest.number:
            self._first_s = frame.captured_s
        self._last_s = frame.captured_s
        self.newest.put(frame)

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
