"""One pipeline, many askers: every answer is the one that its request gets alone, whatever happens beside it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from flashvlm_export.errors import (
    BudgetError,
    ConfigError,
    ImageError,
    LLMError,
    PromptTooLongError,
    QueueFullError,
    SessionError,
    UsageError,
)
from flashvlm_export.runtime.chat import Chat
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.onnxruntime import OnnxRuntimeLLM
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import PrunedPrompt, Pruning, Request
from flashvlm_export.runtime.service import Service
from flashvlm_export.specs import Array

QUESTIONS = ["What is it?", "Where?", "Tell me, in as many words as you can find, what there is to see.", "How many?"]
WAIT_S = 60.0
LONG = SamplingParams(max_new_tokens=500)


@pytest.fixture
def vlm(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, precision="fp32", selectors=["flashvlm", "divprune"], threads=1) as opened:
        yield opened


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


def asked(seed: int) -> tuple[Request, Pruning, SamplingParams]:
    """Requests that differ in everything that a batch could mix up."""
    images = [picture(seed), picture(seed + 1)][: 1 + seed % 2]
    pruning = Pruning(
        budget=(3, 9, 5)[seed % 3],
        positions=("contiguous", "original")[seed % 2],
        selector=(None, "divprune")[seed // 2 % 2],
    )
    return Request(images, QUESTIONS[seed % 4]), pruning, SamplingParams(max_new_tokens=4 + seed % 7)


def question(seed: int = 0) -> Request:
    return Request([picture(seed)], QUESTIONS[0])


class Gate:
    """Holds the service in ``encode_each``, and tells how many requests came in one call."""

    def __init__(self, vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        encode_each = vlm.encode_each

        def held(requests: Sequence[tuple[Request, Pruning]]) -> list[PrunedPrompt]:
            self.sizes.append(len(requests))
            self.reached.set()
            assert self.open.wait(WAIT_S)
            return encode_each(requests)

        monkeypatch.setattr(vlm, "encode_each", held)


def test_answers_are_those_of_each_request_alone(vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    together = []
    run = OnnxRuntimeLLM._run

    def counting(self: OnnxRuntimeLLM, slot: int, rows: Array, *rest: Array) -> Array:
        together.append(len(rows))
        return run(self, slot, rows, *rest)

    alone = []
    for seed in range(24):
        request, pruning, params = asked(seed)
        alone.append(vlm.answer(vlm.encode_each([(request, pruning)])[0], params).token_ids)
    assert len(set(map(tuple, alone))) > 12, "dull answers would match anything"
    monkeypatch.setattr(OnnxRuntimeLLM, "_run", counting)
    with Service(vlm, max_answers=4, max_wait_ms=20) as service, ThreadPoolExecutor(8) as askers:
        answers = list(askers.map(lambda seed: service.submit(*asked(seed)).result(WAIT_S), range(24)))
    assert [answer.token_ids for answer in answers] == alone
    assert max(together) == 4
    for seed, answer in enumerate(answers):
        assert [len(kept) for kept in answer.prompt.indices] == [(3, 9, 5)[seed % 3]] * (1 + seed % 2)
        assert answer.stage_ms["queue"] >= 0
    # The pipeline is again for one.
    request, pruning, params = asked(5)
    assert vlm.answer(vlm.encode_each([(request, pruning)])[0], params).token_ids == alone[5]


def test_coroutines_ask_and_cancel(vlm: Pipeline) -> None:
    alone = [vlm.ask(picture(seed), "Where?", budget=4, params=SamplingParams(8)).token_ids for seed in range(4)]

    async def ask_all(service: Service) -> list[list[int]]:
        requests = [Request([picture(seed)], "Where?") for seed in range(4)]
        given_up = asyncio.wrap_future(service.submit(requests[0], Pruning(4), LONG))
        futures = [asyncio.wrap_future(service.submit(each, Pruning(4), SamplingParams(8))) for each in requests]
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return [answer.token_ids for answer in await asyncio.wait_for(asyncio.gather(*futures), WAIT_S)]

    with Service(vlm, max_answers=2) as service:
        assert asyncio.run(ask_all(service)) == alone


def test_errors_stay_with_their_request(vlm: Pipeline, tmp_path: Path) -> None:
    """Of reading, of selecting, of the language model, and of the listener: beside answers that are right."""
    expected = vlm.answer(vlm.encode([question()])[0], SamplingParams(6)).token_ids
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")

    def listener(piece: str) -> None:
        raise ZeroDivisionError(piece)

    with Service(vlm, max_answers=6, max_wait_ms=200) as service:
        futures = [
            service.submit(question(), params=SamplingParams(6)),
            service.submit(Request([broken], "What?")),
            service.submit(question(), Pruning(99)),
            service.submit(question(), params=SamplingParams(5000)),
            service.submit(question(), on_text=listener),
            service.submit(question(), params=SamplingParams(6)),
        ]
        wait(futures, WAIT_S)
    kinds = [type(future.exception(0)) for future in futures]
    assert kinds == [type(None), ImageError, BudgetError, PromptTooLongError, ZeroDivisionError, type(None)]
    assert [futures[index].result(0).token_ids for index in (0, 5)] == [expected] * 2


def test_a_step_that_fails_for_several_answers_is_told_to_each_and_to_no_later_one(
    vlm: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vlm.answer(vlm.encode([question()])[0], SamplingParams(6)).token_ids
    run, failing = OnnxRuntimeLLM._run, threading.Event()
    failing.set()

    def breaking(self: OnnxRuntimeLLM, slot: int, rows: Array, *rest: Array) -> Array:
        if failing.is_set() and len(rows) > 1:
            raise LLMError("no memory for two")
        return run(self, slot, rows, *rest)

    monkeypatch.setattr(OnnxRuntimeLLM, "_run", breaking)
    with Service(vlm, max_answers=2, max_wait_ms=WAIT_S * 1e3) as service:
        pair = [service.submit(question(), params=SamplingParams(6)) for _ in range(2)]
        wait(pair, WAIT_S)
        # The first is asked for a token of both; alone, the second goes on.
        assert isinstance(pair[0].exception(0), LLMError)
        assert pair[1].result(0).token_ids == expected
        failing.clear()
        pair = [service.submit(question(), params=SamplingParams(6)) for _ in range(2)]
        assert [future.result(WAIT_S).token_ids for future in pair] == [expected] * 2


def test_a_full_queue_refuses_and_cancelling_makes_room(vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(vlm, monkeypatch)
    with Service(vlm, max_answers=1, max_queue=2) as service:
        first = service.submit(question())
        assert gate.reached.wait(WAIT_S)
        second, third = service.submit(question()), service.submit(question(), params=SamplingParams(3))
        with pytest.raises(QueueFullError, match="at most 2, beside 1 under way"):
            service.submit(question())
        assert second.cancel()
        fourth = service.submit(question(), params=SamplingParams(2))
        gate.open.set()
        assert len(third.result(WAIT_S).token_ids) == 3
        assert len(fourth.result(WAIT_S).token_ids) == 2
        assert first.result(0).token_ids
    assert wait([second], WAIT_S).done == {second}
    assert gate.sizes == [1, 1, 1]


def test_cancelling_an_answer_under_way_frees_its_slot(vlm: Pipeline) -> None:
    begun = threading.Event()
    with Service(vlm, max_answers=1) as service:
        long = service.submit(question(), params=LONG, on_text=lambda piece: (begun.set(), time.sleep(0.01)))
        assert begun.wait(WAIT_S)
        after = service.submit(question(1), params=SamplingParams(2))
        assert not after.done()
        assert long.cancel()
        assert len(after.result(WAIT_S).token_ids) == 2
    with pytest.raises(CancelledError):
        long.result(0)


def test_requests_wait_for_company_as_long_as_the_caller_says(vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(vlm, monkeypatch)
    gate.open.set()
    params = SamplingParams(1)
    with Service(vlm, max_answers=2, max_wait_ms=WAIT_S * 1e3) as service:
        pair = [service.submit(question(seed), params=params) for seed in range(2)]
        assert all(future.result(WAIT_S / 2) for future in pair), "a full batch goes at once"
    with Service(vlm, max_answers=2, max_wait_ms=100) as service:
        alone = service.submit(question(), params=params).result(WAIT_S)
        assert alone.stage_ms["queue"] >= 100
    assert gate.sizes == [2, 1]


def test_services_and_chats_take_turns_on_one_pipeline(vlm: Pipeline) -> None:
    """Each leaves a cache for keys and values of its own shape, or none."""
    expected = vlm.ask(picture(0), QUESTIONS[0], params=SamplingParams(5)).token_ids
    chat = Chat(vlm)
    chat.ask(QUESTIONS[0], [picture(0)], params=SamplingParams(300))
    for max_answers, new_tokens in ((2, 200), (4, 5), (3, 400), (1, 5)):
        with Service(vlm, max_answers=max_answers) as service:
            futures = [service.submit(question(), params=SamplingParams(new_tokens)) for _ in range(5)]
            assert [future.result(WAIT_S).token_ids[:5] for future in futures] == [expected] * 5
        assert chat.ask(QUESTIONS[1], params=SamplingParams(5)).token_ids


def test_an_interrupted_close_cancels_what_is_left(vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(vlm, max_answers=2)
    futures = [service.submit(question(seed), params=LONG) for seed in range(3)]
    join, calls = service._thread.join, []

    def interrupted() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join()

    monkeypatch.setattr(service._thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        service.close()
    assert all(future.cancelled() for future in futures)


def test_closing_from_the_services_own_thread_is_refused(vlm: Pipeline) -> None:
    with Service(vlm, max_answers=1) as service:
        future = service.submit(question(), on_text=lambda piece: service.close())
        assert isinstance(future.exception(WAIT_S), UsageError)


def test_closing_answers_what_was_taken_or_cancels_it(vlm: Pipeline) -> None:
    service = Service(vlm, max_answers=2)
    futures = [service.submit(question(seed), params=SamplingParams(5)) for seed in range(5)]
    service.close()
    assert [len(future.result(0).token_ids) for future in futures] == [5] * 5
    with pytest.raises(UsageError, match="closed"):
        service.submit(question())

    service = Service(vlm, max_answers=2)
    futures = [service.submit(question(seed), params=LONG) for seed in range(5)]
    service.close(finish=False)
    assert all(future.cancelled() for future in futures)

    def leave_by_an_error() -> None:
        with Service(vlm, max_answers=2) as service:
            futures[:] = [service.submit(question(seed), params=LONG) for seed in range(5)]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave_by_an_error()
    assert all(future.cancelled() for future in futures)
    assert vlm.ask(picture(0), QUESTIONS[0], params=SamplingParams(2)).token_ids


# The defect that ends the service's thread is the test's own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_service_that_has_broken_down(vlm: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(requests: object) -> None:
        raise SystemExit("a defect")

    monkeypatch.setattr(vlm, "encode_each", defect)
    with Service(vlm, max_answers=2, max_wait_ms=WAIT_S * 1e3) as service:
        futures = [service.submit(question(seed)) for seed in range(2)]
        for future in futures:
            with pytest.raises(SessionError, match="a defect"):
                future.result(WAIT_S)
        with pytest.raises(UsageError, match="closed"):
            service.submit(question())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_answers": 0}, "max_answers"),
        ({"max_answers": 2.5}, "max_answers"),
        ({"max_wait_ms": -1.0}, "max_wait_ms"),
        ({"max_wait_ms": float("inf")}, "max_wait_ms"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms"),
        ({"max_queue": 0}, "max_queue"),
    ],
)
def test_settings_out_of_range(vlm: Pipeline, settings: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Service(vlm, **{"max_answers": 1, **settings})


def test_one_service_at_a_time(vlm: Pipeline) -> None:
    with Service(vlm, max_answers=2) as service:
        with pytest.raises(UsageError, match="another service uses this pipeline"):
            Service(vlm, max_answers=1)
        futures = [service.submit(question(seed), params=SamplingParams(3)) for seed in range(4)]
        assert all(len(future.result(WAIT_S).token_ids) == 3 for future in futures)


@pytest.mark.parametrize("wrong", [("What?",), (question(), 128), (question(), None, {"max_new_tokens": 3})])
def test_arguments_of_another_type(vlm: Pipeline, wrong: tuple[object, ...]) -> None:
    with Service(vlm, max_answers=1) as service:
        with pytest.raises(UsageError, match="not what a service takes"):
            service.submit(*wrong)
        assert service.submit(question(), params=SamplingParams(2)).result(WAIT_S).token_ids


def test_pipelines_that_cannot_serve(tiny_bundle: Path) -> None:
    with Pipeline.open(tiny_bundle, llm=None) as mute, pytest.raises(UsageError, match="without a language model"):
        Service(mute, max_answers=1)
    with pytest.raises(LLMError, match="not open"):
        Service(Pipeline.open(tiny_bundle), max_answers=2)
    single = Pipeline.open(tiny_bundle, llm="transformers:nowhere")
    with pytest.raises(ConfigError, match="one answer at a time"):
        Service(single, max_answers=2)
