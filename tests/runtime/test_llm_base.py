"""What every engine inherits, seen through one that counts: life cycle, checks, stop conditions, numbers of a run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Generator

import numpy as np
import pytest

from flashvlm_export.errors import LLMError, UsageError
from flashvlm_export.runtime.llm.base import Capabilities, Generation, Limits, LLMEngine, SamplingParams

WIDTH, POSITIONS, VOCAB = 4, 32, 100
PROMPT = np.ones((3, WIDTH), np.float32)


class Counting(LLMEngine):
    """Yields 10, 11, 12, …; sleeps 20 ms before the first token and 5 ms before each later one."""

    name = "counting"
    capabilities = Capabilities(
        embeddings=True, explicit_positions=False, batch=False, streaming=True, sampling=False, prefix_reuse=False
    )

    def __init__(self, end: int | None = None, fail_at: int | None = None) -> None:
        super().__init__()
        self.end = end
        self.fail_at = fail_at
        self.events: list[str] = []
        self.steps = 0

    def _open(self) -> Limits:
        self.events.append("open")
        return Limits(WIDTH, POSITIONS, VOCAB)

    def _close(self) -> None:
        self.events.append("close")

    def _generate(self, generation: Generation) -> Generator[int, None, None]:
        try:
            token = 10
            while token != self.end:
                self.steps += 1
                time.sleep(0.02 if token == 10 else 0.005)
                if token == self.fail_at:
                    raise LLMError("the model fell over")
                yield token
                token += 1
        finally:
            self.events.append("generation released")


def run(engine: LLMEngine, max_new_tokens: int = 5, stop: Collection[int] = ()) -> list[int]:
    return list(engine.generate(PROMPT, SamplingParams(max_new_tokens=max_new_tokens), stop_token_ids=stop))


def test_length_stop_and_an_engine_that_ends_by_itself() -> None:
    with Counting() as engine:
        assert engine.last_run is None
        assert run(engine) == [10, 11, 12, 13, 14]
        assert engine.last_run is not None
        assert (engine.last_run.finish_reason, engine.last_run.new_tokens) == ("length", 5)
        assert engine.steps == 5, "a token was computed that nobody asked for"

        assert run(engine, stop=[12, 99]) == [10, 11], "the stop token is not part of the answer"
        assert (engine.last_run.finish_reason, engine.last_run.new_tokens) == ("stop", 2)

        assert run(engine, stop=[10]) == []
        assert (engine.last_run.finish_reason, engine.last_run.new_tokens) == ("stop", 0)
    with Counting(end=12) as engine:
        assert run(engine) == [10, 11]
        assert engine.last_run is not None
        assert engine.last_run.finish_reason == "stop"


def test_the_clock_runs_only_while_the_engine_works() -> None:
    with Counting() as engine:
        for _ in engine.generate(PROMPT, SamplingParams(max_new_tokens=3), stop_token_ids=()):
            time.sleep(0.1)
        stats = engine.last_run
    assert stats is not None
    assert stats.prompt_tokens == 3
    assert 20 <= stats.prefill_ms < 90
    assert 10 <= stats.decode_ms < 90


def test_tokens_stream_as_they_come() -> None:
    with Counting() as engine:
        stream = engine.generate(PROMPT, SamplingParams(max_new_tokens=20), stop_token_ids=())
        assert engine.steps == 0, "the work starts when the first token is asked for"
        assert next(stream) == 10
        assert engine.steps == 1
        stream.close()


def test_closing_early_is_clean() -> None:
    with Counting() as engine:
        stream = engine.generate(PROMPT, SamplingParams(max_new_tokens=20), stop_token_ids=())
        assert [next(stream), next(stream)] == [10, 11]
        stream.close()
        assert engine.events[-1] == "generation released"
        assert engine.last_run is not None
        assert (engine.last_run.finish_reason, engine.last_run.new_tokens) == ("closed", 2)
        for token in engine.generate(PROMPT, SamplingParams(max_new_tokens=20), stop_token_ids=()):
            if token == 11:
                break
        assert run(engine) == [10, 11, 12, 13, 14], "a stream that was left behind keeps the engine busy"


def test_a_reader_that_takes_exactly_all_tokens_saw_a_finished_answer() -> None:
    with Counting() as engine:
        stream = engine.generate(PROMPT, SamplingParams(max_new_tokens=2), stop_token_ids=())
        assert [next(stream), next(stream)] == [10, 11]
        stream.close()
        assert engine.last_run is not None
        assert engine.last_run.finish_reason == "length"


def test_one_answer_at_a_time() -> None:
    with Counting() as engine:
        first = engine.generate(PROMPT, SamplingParams(max_new_tokens=2), stop_token_ids=())
        second = engine.generate(PROMPT, SamplingParams(max_new_tokens=2), stop_token_ids=())
        next(first)
        with pytest.raises(LLMError, match="still being read"):
            next(second)
        assert list(first) == [11], "the first answer was disturbed"


def test_closing_the_engine_ends_its_streams_first() -> None:
    engine = Counting()
    engine.open()
    stream = engine.generate(PROMPT, SamplingParams(max_new_tokens=20), stop_token_ids=())
    next(stream)
    engine.close()
    assert engine.events == ["open", "generation released", "close"]
    assert list(stream) == []
    engine.close()
    with pytest.raises(LLMError, match="not open"):
        run(engine)
    with engine:
        assert run(engine, 1) == [10]
    assert engine.events.count("open") == engine.events.count("close") == 2


def test_a_failing_model_leaves_a_usable_engine_and_no_numbers() -> None:
    with Counting(fail_at=11) as engine:
        stream = engine.generate(PROMPT, SamplingParams(max_new_tokens=20), stop_token_ids=())
        assert next(stream) == 10
        with pytest.raises(LLMError, match="fell over"):
            next(stream)
        assert engine.last_run is None
        engine.fail_at = None
        assert run(engine, 1) == [10]


@pytest.mark.parametrize(
    "prompt",
    [
        np.ones((3, WIDTH + 1), np.float32),
        np.ones((0, WIDTH), np.float32),
        np.ones((1, 3, WIDTH), np.float32),
        np.ones((3, WIDTH), np.int64),
    ],
    ids=["width", "empty", "batch", "ids"],
)
def test_prompts_of_the_wrong_shape(prompt: np.ndarray) -> None:
    with Counting() as engine, pytest.raises(LLMError, match=rf"\[tokens, {WIDTH}\]"):
        engine.generate(prompt, SamplingParams(), stop_token_ids=())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_prompts_that_are_not_finite(bad: float) -> None:
    prompt = np.ones((3, WIDTH), np.float16)
    prompt[1, 2] = bad
    with Counting() as engine, pytest.raises(LLMError, match="row 1 of 3"):
        engine.generate(prompt, SamplingParams(max_new_tokens=1), stop_token_ids=())


def test_a_prompt_that_is_too_long_says_what_to_do() -> None:
    prompt = np.ones((30, WIDTH), np.float32)
    with Counting() as engine:
        assert len(list(engine.generate(prompt, SamplingParams(max_new_tokens=2), stop_token_ids=()))) == 2
        with pytest.raises(LLMError, match="smaller budget") as caught:
            engine.generate(prompt, SamplingParams(max_new_tokens=3), stop_token_ids=())
        assert "at most 2 new tokens" in str(caught.value)
        with pytest.raises(LLMError, match="fewer new tokens"):
            engine.generate(np.ones((40, WIDTH), np.float32), SamplingParams(max_new_tokens=3), stop_token_ids=())


@pytest.mark.parametrize(
    "positions",
    [
        np.arange(4),
        np.arange(3, dtype=np.int32),
        np.array([-1, 0, 1]),
        np.array([0, 2, 2]),
        np.arange(3)[None],
    ],
    ids=["length", "dtype", "negative", "twice", "batch"],
)
def test_positions_that_are_none(positions: np.ndarray) -> None:
    with Counting() as engine, pytest.raises(LLMError, match=r"int64\[3\], ascending"):
        engine.generate(PROMPT, SamplingParams(), stop_token_ids=(), positions=positions)


def test_an_engine_that_counts_by_itself_refuses_gaps() -> None:
    with Counting() as engine:
        params = SamplingParams(max_new_tokens=2)
        assert list(engine.generate(PROMPT, params, stop_token_ids=(), positions=np.arange(3))) == [10, 11]
        with pytest.raises(UsageError, match="'counting' counts positions by itself"):
            engine.generate(PROMPT, params, stop_token_ids=(), positions=np.array([0, 4, 5]))


def test_gaps_take_room_from_the_answer() -> None:
    class Placing(Counting):
        capabilities = dataclasses.replace(Counting.capabilities, explicit_positions=True)

    positions = np.array([0, 20, 29])
    with Placing() as engine:
        params = SamplingParams(max_new_tokens=2)
        assert list(engine.generate(PROMPT, params, stop_token_ids=(), positions=positions)) == [10, 11]
        with pytest.raises(LLMError, match="30 prompt positions") as caught:
            engine.generate(PROMPT, SamplingParams(max_new_tokens=3), stop_token_ids=(), positions=positions)
        assert "budget" not in str(caught.value), "keeping fewer tokens would not help"
