"""A standing question: which frames are asked about, what is counted, how a source that breaks off comes back.

Frames and answers take turns by events, and time is what a test says it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.errors import BudgetError, ConfigError, LLMError, PromptError, UsageError, VideoError
from flashvlm_export.runtime.layout import clip, one_picture
from flashvlm_export.runtime.live import watch as watch_module
from flashvlm_export.runtime.live.frame import Frame, Source
from flashvlm_export.runtime.live.newest import Newest
from flashvlm_export.runtime.live.receiver import Receiver
from flashvlm_export.runtime.live.watch import Report, Seen, Standing, watch
from flashvlm_export.runtime.llm.base import GenerationStats
from flashvlm_export.runtime.prompt import TokenizedPrompt
from flashvlm_export.runtime.request import Answer, PrunedPrompt, Pruning, Request, SelectedImage
from flashvlm_export.runtime.video import Video

SOON_S = 10.0
VIEWED = (0, 255, 0)


class Script(Source):
    """Frames of known grey levels: frame ``n`` has level ``n`` and the time ``n / 10``.

    Args:
        connections: for each time that it is opened, how many frames come, and whether it then breaks off.
        free: whether frames come by themselves, or each when :meth:`release` lets it.
    """

    name = "script"
    reconnects = True

    def __init__(self, *connections: tuple[int, bool], free: bool = False) -> None:
        self._connections = iter(connections)
        self._free = free
        self._turn, self._taken = threading.Semaphore(0), threading.Condition()
        self._number = self._released = self._count = 0

    def release(self, count: int) -> None:
        """Let ``count`` frames come, and return when they have."""
        with self._taken:
            self._released += count
            wanted = self._released
            self._turn.release(count)
            assert self._taken.wait_for(lambda: self._count >= wanted, SOON_S)

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        count, breaks = next(self._connections)
        for _ in range(count):
            while not self._free and not self._turn.acquire(timeout=0.01):
                if stop.is_set():
                    return
            self._number += 1
            yield Frame(self._number / 10, partial(Image.new, "RGB", (8, 8), (self._number,) * 3))
            with self._taken:
                self._count += 1
                self._taken.notify_all()
        if breaks:
            raise VideoError("the cable was pulled", received="plug in hand")


class EndingScript(Script):
    """As a file: what breaks stays broken."""

    reconnects = False


class FakePipeline:
    """Answers with the level of the newest frame that it is shown, and calls ``meanwhile`` with how often it was asked.

    Attributes:
        asked: levels of the frames that each question was about.
        rates: frames per second of the videos among them.
    """

    def __init__(self, meanwhile: Callable[[int], object] = lambda count: None, *, per_moment: int = 0) -> None:
        self.asked: list[list[int]] = []
        self.rates: list[float] = []
        self._meanwhile = meanwhile
        video = SimpleNamespace(frames_per_moment=per_moment) if per_moment else None
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(video=video, source=SimpleNamespace(family="fake")))
        self.prompts = SimpleNamespace(chat=self._chat)
        self.visual_tokens = 4

    def _chat(self, question: str, media: Sequence[str], system: str | None) -> None:
        if not question.strip():
            raise PromptError("the question is empty")

    def views(self, shown: Any) -> list[Image.Image]:
        """Return the picture with a mark, as one that a model crops would differ."""
        marked = shown.copy()
        marked.putpixel((1, 1), VIEWED)
        return [marked]

    def encode_each(self, asked: Sequence[tuple[Request, Pruning]]) -> list[PrunedPrompt]:
        ((request, _),) = asked
        (shown,) = request.images
        frames = list(shown.frames) if isinstance(shown, Video) else [shown]
        self.asked.append([int(np.asarray(frame)[0, 0, 0]) for frame in frames])
        self.rates += [shown.fps] if isinstance(shown, Video) else []
        zero = np.zeros(1, np.int64)
        layout = clip([one_picture((2, 2))] * len(frames), range(len(frames)) if isinstance(shown, Video) else ())
        kept = SelectedImage(np.zeros((1, 4)), zero, zero, np.zeros(layout.num_tokens), layout)
        return [PrunedPrompt(np.zeros((1, 4)), zero, TokenizedPrompt("", zero, (0,), zero > 0), [kept], {})]

    def answering(
        self, prompt: PrunedPrompt, params: Any, *, on_text: Callable[[str], object]
    ) -> Generator[Answer | None, None, None]:
        yield None
        self._meanwhile(len(self.asked))
        text = f"level {self.asked[-1][-1]}"
        on_text(text)
        yield Answer(text, [1], prompt, GenerationStats(1, 0, 1, 0.0, 0.0, "stop"))


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds


def watched(vlm: FakePipeline, source: Source, standing: Standing, **options: Any) -> tuple[Report, list[Seen]]:
    seen: list[Seen] = []
    clock = options.pop("clock", Clock())
    options = {"on_seen": seen.append, "pause": clock.pause, **options}
    return watch(vlm, source, standing, clock=clock, **options), seen  # type: ignore[arg-type]  # a stand-in


def test_the_newest_frame_is_asked_about_and_the_others_are_dropped() -> None:
    """Four frames come during each answer: the last of them is next, and every frame is accounted for."""
    source, clock = Script((13, False)), Clock()

    def meanwhile(count: int) -> None:
        if count < 4:
            source.release(4)
        clock.now_s = (4 * count - 3) / 10 + count * 0.05

    threading.Thread(target=source.release, args=(1,)).start()
    vlm = FakePipeline(meanwhile)
    pieces: list[str] = []
    report, seen = watched(vlm, source, Standing("?", answers=4), clock=clock, on_text=pieces.append)
    assert vlm.asked == [[1], [5], [9], [13]]
    assert [each.answer.text for each in seen] == pieces == ["level 1", "level 5", "level 9", "level 13"]
    assert [each.frame for each in seen] == [1, 5, 9, 13]
    assert [each.number for each in seen] == [1, 2, 3, 4]
    assert [each.captured_s for each in seen] == [0.1, 0.5, 0.9, 1.3]
    assert [each.latency_ms for each in seen] == pytest.approx([50, 100, 150, 200])
    assert [each.statistics.dropped for each in seen] == [0, 3, 6, 9]
    totals = report.statistics
    assert (report.ended, report.error) == ("answers", None)
    assert (totals.received, totals.answered, totals.dropped) == (13, 4, 9)
    assert totals.source_fps == pytest.approx(10)
    assert totals.seconds == pytest.approx(1.5)
    assert totals.answers_per_second == pytest.approx(4 / 1.5)
    assert totals.latency_p50_ms == pytest.approx(125)  # between the second and the third
    assert totals.latency_p99_ms == pytest.approx(150 + 0.97 * 50)  # 0.99 of three steps


def test_a_frame_that_came_before_the_source_ended_is_still_asked_about() -> None:
    source = Script((3, False))

    def meanwhile(count: int) -> None:
        if count == 1:
            source.release(2)

    threading.Thread(target=source.release, args=(1,)).start()
    vlm = FakePipeline(meanwhile)
    report, _ = watched(vlm, source, Standing("?"))
    assert vlm.asked == [[1], [3]]
    assert report.ended == "source"
    assert (report.statistics.received, report.statistics.dropped) == (3, 1)


def test_an_interrupt_ends_it_with_its_report() -> None:
    source = Script((9, False))

    def meanwhile(count: int) -> None:
        source.release(1)
        if count == 3:
            raise KeyboardInterrupt

    threading.Thread(target=source.release, args=(1,)).start()
    report, seen = watched(FakePipeline(meanwhile), source, Standing("?"))
    assert report.ended == "interrupt"
    assert len(seen) == 2
    # The third was under way, the fourth had come.
    assert (report.statistics.received, report.statistics.answered, report.statistics.dropped) == (4, 2, 2)


def test_time_limits_and_pauses() -> None:
    """A question every two seconds, for five: at 0, 2 and 4; each is about the frame of that moment."""
    source, clock = Script((100, False)), Clock()

    def pause(seconds: float) -> None:
        clock.now_s += seconds
        source.release(round(seconds * 10))

    threading.Thread(target=source.release, args=(1,)).start()
    vlm = FakePipeline()
    report, _ = watched(vlm, source, Standing("?", every_s=2, seconds=5), clock=clock, pause=pause)
    assert vlm.asked == [[1], [21], [41]]
    assert report.ended == "seconds"
    assert report.statistics.seconds == pytest.approx(5)
    assert (report.statistics.received, report.statistics.dropped) == (51, 48)


def test_nothing_but_time_passes_without_frames() -> None:
    """The wait for a frame ends with the time, by the real clock."""
    report = watch(FakePipeline(), Script((1, False)), Standing("?", seconds=0.05))  # type: ignore[arg-type]  # a stand-in
    assert (report.ended, report.statistics.received, report.statistics.source_fps) == ("seconds", 0, None)
    assert report.statistics.latency_p50_ms is None


def test_a_window_shows_the_newest_frames_that_were_asked_about() -> None:
    """Every fourth frame is asked about: the window has 10 / 4 frames per second, whatever the source has."""
    source = Script((17, False))

    def meanwhile(count: int) -> None:
        if count < 5:
            source.release(4)

    threading.Thread(target=source.release, args=(1,)).start()
    vlm = FakePipeline(meanwhile, per_moment=2)
    _, seen = watched(vlm, source, Standing("?", frames=4, answers=5))
    assert vlm.asked == [[1], [1, 5], [1, 5, 9], [1, 5, 9, 13], [9, 13, 17]]
    assert vlm.rates == pytest.approx([1.0, 2.5, 2.5, 2.5, 2.5])
    assert [int(np.asarray(each.view)[0, 0, 0]) for each in seen] == [1, 5, 9, 13, 17]


def test_a_frame_of_another_size_begins_a_new_window() -> None:
    class Turning(Script):
        def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
            for frame in super().frames(stop):
                size = (8, 8) if self._number < 3 else (6, 8)
                yield Frame(frame.captured_s, partial(Image.new, "RGB", size, (self._number,) * 3))

    source = Turning((4, False))
    vlm = FakePipeline(lambda count: source.release(1) if count < 4 else None, per_moment=1)
    threading.Thread(target=source.release, args=(1,)).start()
    report, _ = watched(vlm, source, Standing("?", frames=3, answers=4))
    assert vlm.asked == [[1], [1, 2], [3], [3, 4]]
    assert report.ended == "answers"


def test_the_frame_is_shown_as_the_encoder_sees_it() -> None:
    _, (seen,) = watched(FakePipeline(), Script((1, False), free=True), Standing("?"))
    assert seen.view.getpixel((1, 1)) == VIEWED


def test_the_end_of_the_source_ends_a_pause() -> None:
    """By the real clock; a frame that came before the end still waits for its time."""
    source = Script((1, False), free=True)
    report = watch(FakePipeline(), source, Standing("?", every_s=600, seconds=900))  # type: ignore[arg-type]  # a stand-in
    assert report.ended == "source"
    assert report.statistics.seconds < 60

    place: Newest[str] = Newest()
    place.put("a")
    place.close()
    before_s = time.monotonic()
    place.wait_end(0, 0.05)
    assert time.monotonic() - before_s >= 0.05


def test_percentiles_are_of_the_newest_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_LATENCIES", 2)
    source, clock = Script((3, False)), Clock()

    def meanwhile(count: int) -> None:
        if count < 3:
            source.release(1)
        clock.now_s = count / 10 + (9.0 if count == 1 else 0.1)

    threading.Thread(target=source.release, args=(1,)).start()
    report, seen = watched(FakePipeline(meanwhile), source, Standing("?", answers=3), clock=clock)
    assert seen[0].latency_ms == pytest.approx(9000)
    assert report.statistics.latency_p99_ms == pytest.approx(100)


def test_a_live_source_that_breaks_off_comes_back() -> None:
    """Broken twice, the second time at once again: pauses grow, and begin anew after frames."""
    source = Script((2, True), (0, True), (0, True), (3, True), (1, False), free=True)
    heard: list[str] = []
    with Receiver(source, on_event=heard.append, pauses_s=(0.001, 0.002)) as receiver:
        receiver._thread.join(SOON_S)
    assert receiver.newest.number == 6
    assert receiver.reconnects == 2
    assert receiver.error is None
    pulled = "the cable was pulled: plug in hand; trying again in 0.00"
    back = "connected again: script"
    assert heard == [pulled + "1 s", pulled + "2 s", pulled + "2 s", back, pulled + "1 s", back]


def test_a_source_that_never_delivered_is_a_mistake() -> None:
    for source in (Script((0, True)), EndingScript((0, True))):
        with pytest.raises(VideoError, match="the cable was pulled"):
            watched(FakePipeline(), source, Standing("?"))


def test_a_file_that_breaks_ends_with_a_report_of_what_was_answered() -> None:
    report, _ = watched(FakePipeline(), EndingScript((2, True), free=True), Standing("?"))
    assert report.ended == "source"
    assert isinstance(report.error, VideoError)
    assert report.statistics.received == 2


def test_a_defect_of_a_source_is_not_swallowed() -> None:
    class Defect(Script):
        def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
            yield from super().frames(stop)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watched(FakePipeline(), Defect((2, False), free=True), Standing("?"))


def test_an_error_of_the_pipeline_ends_it_and_lets_go_of_the_source() -> None:
    def meanwhile(count: int) -> None:
        raise LLMError("too long")

    with pytest.raises(LLMError):
        watched(FakePipeline(meanwhile), Script((9, False), free=True), Standing("?"))
    assert not [thread for thread in threading.enumerate() if thread.name == "flashvlm-receiver"]


def test_what_cannot_be_asked_is_refused_before_the_source_opens() -> None:
    class Unopened(Script):
        def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
            raise AssertionError

    with pytest.raises(PromptError):
        watched(FakePipeline(), Unopened(), Standing(" "))
    with pytest.raises(BudgetError, match="out of range"):
        watched(FakePipeline(), Unopened(), Standing("?", pruning=Pruning(5)))
    with pytest.raises(BudgetError, match="out of range"):
        watched(FakePipeline(per_moment=2), Unopened(), Standing("?", pruning=Pruning(9), frames=2))
    with pytest.raises(UsageError, match="takes no videos"):
        watched(FakePipeline(), Unopened(), Standing("?", frames=4))
    with pytest.raises(UsageError, match="no moments"):
        watched(FakePipeline(), Unopened(), Standing("?", pruning=Pruning(division="relevance")))
    with pytest.raises(ConfigError, match="whole moments"):
        watched(FakePipeline(per_moment=2), Unopened(), Standing("?", frames=3))
    for wrong in ({"every_s": -1.0}, {"seconds": 0.0}, {"answers": 0}, {"seconds": float("nan")}):
        with pytest.raises(ConfigError, match="out of range"):
            Standing("?", **wrong)  # type: ignore[arg-type]  # each by its name


def test_readers_of_the_newest_miss_values_and_never_wait_for_each_other() -> None:
    place: Newest[str] = Newest()
    assert place.wait(timeout_s=0.001) is None
    for value in "abc":
        place.put(value)
    assert place.wait() == (3, "c")
    assert place.wait(2) == (3, "c")
    assert place.wait(3, timeout_s=0.001) is None
    got: list[tuple[int, str] | None] = []
    readers = [threading.Thread(target=lambda: got.append(place.wait(3, SOON_S))) for _ in range(3)]
    for reader in readers:
        reader.start()
    place.put("d")
    for reader in readers:
        reader.join(SOON_S)
    assert got == [(4, "d")] * 3
    place.close()
    place.put("e")
    assert place.wait(3) == (4, "d")
    assert place.wait(4) is None
    assert place.closed
