"""The loop: the newest frame is asked about, answered, and then the newest of those that came meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image

from flashvlm_export.errors import ConfigError, FlashVLMError, UsageError
from flashvlm_export.runtime.live.frame import Clock, Frame, Source
from flashvlm_export.runtime.live.receiver import Receiver
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Answer, Pruning, Request, SelectedImage
from flashvlm_export.runtime.video import RATES, FrameWindow, Video
from flashvlm_export.specs import check_budget

Ended = Literal["source", "answers", "seconds", "interrupt"]

# Latencies that percentiles are taken of: the newest ones of a run that may last for months.
_LATENCIES = 10_000


@dataclass(frozen=True)
class Standing:
    """What is asked of every frame, and for how long.

    Attributes:
        question: the user's words.
        system: system text for the chat template, if any.
        pruning: of each frame, or of the window.
        params: how to choose tokens; greedy without.
        frames: of the newest frames that were asked about, how many are shown as one video; ``None`` shows the newest
            as an image.
        every_s: least seconds from one question to the next; 0 asks as soon as there is an answer.
        answers: end after so many; ``None`` for no limit.
        seconds: end after so long, the answer under way included; ``None`` for no limit.

    Raises:
        ConfigError: if a number is out of range.
    """

    question: str
    system: str | None = None
    pruning: Pruning = field(default_factory=Pruning)
    params: SamplingParams | None = None
    frames: int | None = None
    every_s: float = 0.0
    answers: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("every", self.every_s, 0.0),
            ("seconds", self.seconds, 1e-3),
            ("answers", self.answers, 1),
        ):
            if value is not None and not least <= value < float("inf"):
                raise ConfigError(f"{name} is out of range", received=value, expected=f"{least:g} or more")


@dataclass(frozen=True)
class Statistics:
    """What was counted and measured until now.

    Attributes:
        seconds: since the loop began.
        received: frames that the source delivered.
        answered: frames that were asked about and answered.
        dropped: frames that came before the newest one that was asked about, and were not asked about themselves; at
            the end, all that no answer is about.
        source_fps: frames received per second, interruptions included; ``None`` of fewer than two.
        answers_per_second: over the time since the loop began.
        latency_p50_ms, latency_p99_ms: from the capture of a frame to the end of its answer, over the newest 10,000;
            ``None`` without any.
        reconnects: how often a source that had broken off delivered again.
    """

    seconds: float
    received: int
    answered: int
    dropped: int
    source_fps: float | None
    answers_per_second: float
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    reconnects: int


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame with its answer.

    Attributes:
        number: of the answer, from 1.
        frame: number of the frame among those received, from 1.
        captured_s: when it was captured, in seconds since the loop began.
        latency_ms: from its capture to the end of the answer.
        view: the frame as the encoder sees it.
        answer: with what was kept of the frame, or of the window whose last frame it is.
        statistics: until now.
    """

    number: int
    frame: int
    captured_s: float
    latency_ms: float
    view: Image.Image
    answer: Answer
    statistics: Statistics

    @property
    def kept(self) -> SelectedImage:
        """What was kept."""
        return self.answer.prompt.images[0]


@dataclass(frozen=True)
class Report:
    """How the loop ended.

    Attributes:
        ended: the source came to its end or broke, there were as many answers as wanted, the time was over, or the
            user interrupted.
        error: what the source broke of, after at least one frame.
        statistics: of the whole run.
    """

    ended: Ended
    error: FlashVLMError | None
    statistics: Statistics


def watch(
    vlm: Pipeline,
    source: Source,
    standing: Standing,
    *,
    on_seen: Callable[[Seen], object] = lambda seen: None,
    on_text: Callable[[str], object] = lambda piece: None,
    on_event: Callable[[str], object] = lambda text: None,
    clock: Clock = time.monotonic,
    pause: Callable[[float], object] | None = None,
) -> Report:
    """Ask the standing question of the newest frame, again and again, until a limit, the source's end or Ctrl-C.

    Frames are not queued: while an answer is under way, each frame replaces the one before.

    Args:
        vlm: opened, with a language model; nobody else uses it meanwhile.
        source: read on a thread of its own.
        standing: what is asked, and until when.
        on_seen: hears of each frame that was answered, before the next is taken: what it does adds to the time of none,
            but makes answers rarer.
        on_text: hears each piece of an answer as it comes.
        on_event: hears in words when a source breaks off and comes back, on another thread.
        clock: the one that the source's frames have their times of.
        pause: waits for so many seconds; if nothing is said, no longer than more frames can come.

    Returns:
        How it ended, Ctrl-C (:class:`KeyboardInterrupt`) included: that is how people end it.

    Raises:
        VideoError, DependencyError: if the source delivers nothing at all.
        FlashVLMError: what :meth:`Pipeline.encode_each` and :meth:`Pipeline.answering` raise.
    """
    check_standing(vlm, standing)  # what cannot be asked is refused before a camera opens
    window = _window(vlm, standing)
    run = _Run(vlm, standing, window, clock)
    ended: Ended = "source"
    with Receiver(source, on_event=on_event) as receiver:
        try:
            ended = run.loop(receiver, on_seen, on_text, pause)
        except KeyboardInterrupt:
            ended = "interrupt"
    statistics = run.statistics(receiver, receiver.newest.number - run.answered)
    error = receiver.error if ended == "source" else None
    if error is not None and (not isinstance(error, FlashVLMError) or not statistics.received):
        raise error
    return Report(ended, error, statistics)


class _Run:
    """One run of the loop, with what is counted in it."""

    def __init__(self, vlm: Pipeline, standing: Standing, window: _Window | None, clock: Clock) -> None:
        self._vlm, self._standing, self._window, self._clock = vlm, standing, window, clock
        self._began_s = clock()
        self._latencies_ms: deque[float] = deque(maxlen=_LATENCIES)
        self.answered = 0

    def loop(
        self,
        receiver: Receiver,
        on_seen: Callable[[Seen], object],
        on_text: Callable[[str], object],
        pause: Callable[[float], object] | None,
    ) -> Ended:
        number, due_s = 0, self._began_s
        while True:
            if self.answered == self._standing.answers:
                return "answers"
            if (wait_s := due_s - self._clock()) > 0:
                (pause or partial(receiver.newest.wait_end, number))(min(wait_s, self._left_s(wait_s)))
            left_s = None if self._standing.seconds is None else self._left_s(0)
            if left_s == 0:
                return "seconds"
            newest = receiver.newest.wait(number, left_s)
            if newest is None:
                return "source" if receiver.newest.closed else "seconds"
            number, frame = newest
            due_s = self._clock() + self._standing.every_s
            view, answer = self._ask(frame, on_text)
            latency_ms = (self._clock() - frame.captured_s) * 1e3
            self.answered += 1
            self._latencies_ms.append(latency_ms)
            statistics = self.statistics(receiver, number - self.answered)
            captured_s = frame.captured_s - self._began_s
            on_seen(Seen(self.answered, number, captured_s, latency_ms, view, answer, statistics))

    def _left_s(self, otherwise: float) -> float:
        """Return how much of the time is left, 0 if nothing is."""
        if self._standing.seconds is None:
            return otherwise
        return max(0.0, self._began_s + self._standing.seconds - self._clock())

    def _ask(self, frame: Frame, on_text: Callable[[str], object]) -> tuple[Image.Image, Answer]:
        """Return the frame as the encoder sees it, and the answer to it or to the window that ends with it."""
        picture = frame.decode()
        shown = picture if self._window is None else self._window.push(picture, frame.captured_s)
        request = Request([shown], self._standing.question, self._standing.system)
        prompt = self._vlm.encode_each([(request, self._standing.pruning)])[0]
        with closing(self._vlm.answering(prompt, self._standing.params, on_text=on_text)) as steps:
            answer = next(step for step in steps if step is not None)
        view = picture if self._window else self._vlm.views(picture)[0]
        return view, answer

    def statistics(self, receiver: Receiver, dropped: int) -> Statistics:
        seconds = self._clock() - self._began_s
        p50, p99 = np.percentile(self._latencies_ms, (50, 99)) if self._latencies_ms else (None, None)
        return Statistics(
            seconds=seconds,
            received=receiver.newest.number,
            answered=self.answered,
            dropped=dropped,
            source_fps=receiver.fps,
            answers_per_second=self.answered / seconds if seconds > 0 else 0.0,
            latency_p50_ms=None if p50 is None else float(p50),
            latency_p99_ms=None if p99 is None else float(p99),
            reconnects=receiver.reconnects,
        )


class _Window:
    """The newest frames that were asked about, as a video of the rate at which they really came.

    A frame of another size, as of a camera that came back turned, begins a new one: a video has one size.
    """

    def __init__(self, frames: int, frames_per_moment: int) -> None:
        self._empty = partial(FrameWindow, frames, 1.0, frames_per_moment)
        self._frames, self._size = self._empty(), (0, 0)
        self._times_s: list[float] = []

    def push(self, picture: Image.Image, captured_s: float) -> Video:
        if picture.size != self._size:
            self._frames, self._size = self._empty(), picture.size
        frames = self._frames.push(picture).frames
        self._times_s = [*self._times_s, captured_s][-len(frames) :]
        seconds = self._times_s[-1] - self._times_s[0]
        fps = (len(frames) - 1) / seconds if seconds > 0 else 1.0
        return Video(frames, min(max(fps, RATES[0]), RATES[1]))


def check_standing(vlm: Pipeline, standing: Standing) -> None:
    """Raise :class:`FlashVLMError` unless ``vlm`` can be asked so; of tiles, a frame may have fewer than the budget."""
    window = _window(vlm, standing)
    if standing.pruning.budget not in (None, "full"):
        check_budget(standing.pruning.budget, vlm.visual_tokens * (standing.frames or 1))
    vlm.prompts.chat(standing.question, ["video" if window else "image"], standing.system)


def _window(vlm: Pipeline, standing: Standing) -> _Window | None:
    if standing.frames is None:
        if standing.pruning.division != "evenly":
            received, expected = f"division by {standing.pruning.division}", "a window of frames too"
            raise UsageError("a single frame has no moments", received=received, expected=expected)
        return None
    settings = vlm.bundle.manifest.video
    if settings is None:
        raise UsageError(
            "this model takes no videos",
            received=f"a window of {standing.frames} frames, {vlm.bundle.manifest.source.family}",
            expected="one that does: flashvlm models",
            hint="leave the window out: each frame is then asked about as an image",
        )
    return _Window(standing.frames, settings.frames_per_moment)
