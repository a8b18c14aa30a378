"""One pipeline for many threads: what is asked at about the same time is encoded together and answered side by side.

::

    with Pipeline.open("bundle", selectors=[]) as vlm, Service(vlm, max_answers=8) as service:
        future = service.submit(Request(["photo.jpg"], "What is in the picture?"), Pruning(budget=128))
        print(future.result().text)                                      # from any thread
        answer = await asyncio.wrap_future(service.submit(request))      # from a coroutine
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType

from flashvlm_export.errors import ConfigError, QueueFullError, SessionError, UsageError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Answer, PrunedPrompt, Pruning, Request

_LONGEST_WAIT_MS = 3_600_000.0
# Pipelines that a service uses now.
_served: weakref.WeakSet[Pipeline] = weakref.WeakSet()


@dataclass(eq=False)
class _Job:
    """One request, from the queue to its answer.

    Attributes:
        arrived: when it was asked, in seconds of :func:`time.perf_counter`.
        steps: works on the answer, once its images are encoded.
        queue_ms: from its arrival until its images were taken up.
    """

    request: Request
    pruning: Pruning
    params: SamplingParams | None
    on_prompt: Callable[[PrunedPrompt], object]
    on_text: Callable[[str], object]
    future: Future[Answer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    steps: Generator[Answer | None, None, None] | None = None
    queue_ms: float = 0.0

    def finish(self, result: Answer | Exception | None) -> None:
        """Stop working on it, and hand out the answer or the error; a request that was cancelled gets neither."""
        if self.steps is not None:
            self.steps.close()
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, Answer):
            self.future.set_result(replace(result, stage_ms={"queue": self.queue_ms, **result.stage_ms}))
        else:
            self.future.set_exception(result)


class Service:
    """Answers the requests of many threads and coroutines with one pipeline, on a thread of its own.

    The thread takes up what has arrived, as far as there is room, encodes it together, and then computes a token of
    every answer under way before it looks for arrivals again. What one request fails of does not touch the others.

    Args:
        vlm: opened, with a language model; nobody else uses it until the service is closed.
        max_answers: answers under way at once; above 1 for engines with the capability ``batch``. Each takes memory
            for keys and values of its prompt and answer.
        max_wait_ms: how long a request waits, when nothing is under way, for others to be encoded with.
        max_queue: requests that wait beside those that there is room for; one more is refused.

    Attributes:
        batch_sizes: how often so many requests were encoded together.

    Raises:
        ConfigError: if a number is out of range, or the engine answers one at a time.
        UsageError: if the pipeline has no language model, or a service already.
        LLMError: if the pipeline is not open.
    """

    def __init__(self, vlm: Pipeline, *, max_answers: int, max_wait_ms: float = 5.0, max_queue: int = 64) -> None:
        llm = vlm.llm
        if llm is None:
            raise UsageError("this pipeline was opened without a language model", expected="one that has")
        for name, count in (("max_answers", max_answers), ("max_queue", max_queue)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                expected = "a whole number from 1"
                raise ConfigError(f"service: {name} is out of range", received=repr(count), expected=expected)
        if not isinstance(max_wait_ms, (int, float)) or not 0 <= max_wait_ms <= _LONGEST_WAIT_MS:
            expected = f"0 to {_LONGEST_WAIT_MS:.0f}"
            raise ConfigError("service: max_wait_ms is out of range", received=repr(max_wait_ms), expected=expected)
        if max_answers > 1 and not llm.capabilities.batch:
            raise ConfigError(
                f"the engine '{llm.name}' works on one answer at a time",
                received=f"max_answers={max_answers}",
                expected="1",
                hint="max_answers=1, or an engine that batches (onnxruntime, llamacpp, vllm)",
            )
        _ = llm.limits  # raises while the pipeline is not open
        if vlm in _served:
            raise UsageError(
                "another service uses this pipeline", expected="a pipeline of its own, or one service for all requests"
            )
        _served.add(vlm)
        self.vlm = vlm
        self.max_answers = max_answers
        self.max_wait_ms = max_wait_ms
        self.max_queue = max_queue
        self.batch_sizes: Counter[int] = Counter()
        self._llm = llm
        self._waiting: deque[_Job] = deque()
        self._under_way: list[_Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="flashvlm-service", daemon=True)
        llm.max_answers = max_answers
        self._thread.start()

    def submit(
        self,
        request: Request,
        pruning: Pruning | None = None,
        params: SamplingParams | None = None,
        *,
        on_prompt: Callable[[PrunedPrompt], object] = lambda prompt: None,
        on_text: Callable[[str], object] = lambda piece: None,
    ) -> Future[Answer]:
        """Put a request into the queue, from any thread, and return its future at once.

        Args:
            request: what is asked. Arrays and Pillow images are read when the request is taken up: hand over ones that
                do not change.
            pruning: of its images; the defaults without.
            params: how to choose tokens; greedy without.
            on_prompt: hears what is kept of the images, before the answer begins.
            on_text: hears each piece of text. All of these, and the future's callbacks, are called on the service's
                thread: everything waits for them to return, so they must not wait for another answer.

        Returns:
            The answer to come, whose ``stage_ms`` has the time in the queue too; or what :meth:`Pipeline.encode_each`,
            :meth:`Pipeline.answer`, ``on_prompt`` or ``on_text`` raise. ``cancel()`` succeeds until the answer is
            there, and makes room for another.

        Raises:
            QueueFullError: if as many requests are waiting as may.
            UsageError: if the service is closed, or an argument is of another type.
        """
        given = ((request, Request), (pruning, Pruning | None), (params, SamplingParams | None))
        for value, kind in given:
            if not isinstance(value, kind):
                raise UsageError(
                    "this is not what a service takes",
                    received=repr(value),
                    expected="submit(Request([image], question), Pruning(budget=…), SamplingParams(…))",
                )
        job = _Job(request, Pruning() if pruning is None else pruning, params, on_prompt, on_text)
        with self._changed:
            if self._closing:
                raise UsageError("the service is closed", expected="one that is open")
            self._drop_cancelled()
            if len(self._waiting) + len(self._under_way) >= self.max_queue + self.max_answers:
                raise QueueFullError(
                    "too many requests are waiting",
                    received=f"one more than {self.max_queue}",
                    expected=f"at most {self.max_queue}, beside {self.max_answers} under way",
                    hint="ask again later; for bursts a larger max_queue, for more in the same time a smaller budget",
                )
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return not self._closing

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return len(self._under_way)

    def close(self, *, finish: bool = True) -> None:
        """Take no more requests, and return when those that were taken are answered, or else cancelled.

        An interrupt while it waits cancels the rest.

        Raises:
            UsageError: if the service's own thread calls it, from ``on_text`` or a callback.
        """
        if threading.current_thread() is self._thread:
            raise UsageError("a service cannot wait for its own thread", expected="close() from another thread")
        self._end(finish)
        try:
            self._thread.join()
        except BaseException:
            self._end(finish=False)
            self._thread.join()
            raise
        self._llm.max_answers = 1
        _served.discard(self.vlm)

    def _end(self, finish: bool) -> None:
        with self._changed:
            self._closing = True
            for job in () if finish else (*self._waiting, *self._under_way):
                job.future.cancel()
            self._changed.notify()

    def _work(self) -> None:
        try:
            while not self._closing or self._waiting or self._under_way:
                self._begin(self._arrivals())
                for job in list(self._under_way):
                    self._advance(job)
        except BaseException as error:  # a defect: nobody shall wait for ever
            with self._changed:
                self._closing = True
                for job in (*self._waiting, *self._under_way):
                    job.finish(SessionError("the service has broken down", received=repr(error)))
            raise

    def _arrivals(self) -> list[_Job]:
        """Take from the queue what there is room for; with nothing under way, wait for a request and its company."""
        with self._changed:
            if not self._under_way:
                self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._waiting and not self._under_way:
                left = self._waiting[0].arrived + self.max_wait_ms / 1e3 - time.perf_counter()
                self._changed.wait_for(lambda: self._closing or len(self._waiting) >= self.max_answers, max(left, 0))
            self._drop_cancelled()
            room = self.max_answers - len(self._under_way)
            arrivals = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._under_way += arrivals
            return arrivals

    def _drop_cancelled(self) -> None:
        """Take requests that were cancelled out of the queue; the lock has to be held."""
        jobs, self._waiting = self._waiting, deque()
        for job in jobs:
            if job.future.cancelled():
                job.finish(None)
            else:
                self._waiting.append(job)

    def _begin(self, jobs: Sequence[_Job]) -> None:
        """Encode the images of ``jobs``, together if none of them fails."""
        if not jobs:
            return
        now = time.perf_counter()
        try:
            prompts = self.vlm.encode_each([(job.request, job.pruning) for job in jobs])
        except Exception as error:  # whatever it is, it belongs to the request, and the thread goes on
            if len(jobs) == 1:
                self._let_go(jobs[0], error)
                return
            for job in jobs:
                self._begin([job])
            return
        self.batch_sizes[len(jobs)] += 1
        for job, prompt in zip(jobs, prompts, strict=True):
            job.queue_ms = (now - job.arrived) * 1e3
            try:
                job.steps = self.vlm.answering(prompt, job.params, on_text=job.on_text)
                job.on_prompt(prompt)
            except Exception as error:  # whatever it is, it belongs to the request, and the thread goes on
                self._let_go(job, error)

    def _advance(self, job: _Job) -> None:
        """Compute the next token of an answer, and of those that wait beside it; let go of it at its end."""
        assert job.steps is not None  # it was begun
        result: Answer | Exception | None = None
        try:
            if not job.future.cancelled():
                result = next(job.steps)
        except Exception as error:  # whatever it is, it belongs to the request, and the thread goes on
            result = error
        if result is not None or job.future.cancelled():
            self._let_go(job, result)

    def _let_go(self, job: _Job, result: Answer | Exception | None) -> None:
        self._under_way.remove(job)
        job.finish(result)

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finish=kind is None)
