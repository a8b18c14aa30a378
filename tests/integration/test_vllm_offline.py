"""vLLM in this process (``make vllm-lane``): what the engine hands on to it, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import LLMError, SessionError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.vllm_offline import VllmOfflineLLM
from flashvlm_export.runtime.pipeline import Pipeline

TEXT = os.environ.get("FLASHVLM_VLLM_TEXT")
pytestmark = pytest.mark.skipif(TEXT is None, reason="needs an environment with vLLM: make vllm-lane")
OPTIONS = {"dtype": "float32", "enforce_eager": True}


def make_engine(bundle: Path, sign: int = 1) -> VllmOfflineLLM:
    assert TEXT is not None
    vlm = Pipeline.open(Bundle.open(bundle), llm=None)
    return VllmOfflineLLM(
        Path(TEXT), lambda ids: sign * vlm.embeddings.lookup(ids), vlm.embeddings.vocab_size, options=OPTIONS
    )


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[VllmOfflineLLM]:
    with make_engine(tiny_bundle) as opened:
        yield opened


def rows(engine: VllmOfflineLLM, seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, engine.limits.width)).astype(np.float32)


def said(engine: VllmOfflineLLM, prompt: np.ndarray, stop: tuple[int, ...] = (), **settings: object) -> list[int]:
    return list(engine.generate(prompt, SamplingParams(**settings), stop_token_ids=stop))


def test_settings_reach_vllm(engine: VllmOfflineLLM) -> None:
    prompt = rows(engine, 0, 9)
    greedy = said(engine, prompt, max_new_tokens=12)
    assert len(greedy) == 12
    assert said(engine, prompt, max_new_tokens=12, temperature=1.0, top_k=1) == greedy
    assert said(engine, prompt, (greedy[4],), max_new_tokens=12) == greedy[: greedy.index(greedy[4])]
    assert engine.last_run is not None
    assert engine.last_run.finish_reason == "stop"
    draws = [said(engine, prompt, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    stream = engine.generate(prompt, SamplingParams(max_new_tokens=500), stop_token_ids=())
    assert [next(stream), next(stream)] == greedy[:2]
    stream.close()
    assert said(engine, prompt, max_new_tokens=3) == greedy[:3]
    with pytest.raises(LLMError, match="at most"):
        said(engine, prompt, max_new_tokens=engine.limits.max_positions)


def test_answers_under_way_at_once_are_those_of_each_alone(engine: VllmOfflineLLM) -> None:
    prompts = [rows(engine, seed, 5 + 7 * seed) for seed in range(4)]
    alone = [said(engine, prompt, max_new_tokens=10 + index) for index, prompt in enumerate(prompts)]
    engine.max_answers = 4
    streams = [
        engine.generate(prompt, SamplingParams(max_new_tokens=10 + index), stop_token_ids=())
        for index, prompt in enumerate(prompts)
    ]
    together: list[list[int]] = [[] for _ in streams]
    for _ in range(14):
        for stream, tokens in zip(streams, together, strict=True):
            tokens.extend([token] if (token := next(stream, None)) is not None else [])
    engine.max_answers = 1
    assert together == alone


def test_another_model_and_no_model_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(LLMError, match="not the one that the bundle was exported with"):
        make_engine(tiny_bundle, sign=-1).open()
    missing = VllmOfflineLLM(Path("nowhere"), lambda ids: np.zeros((len(ids), 64)), 320)
    with pytest.raises(SessionError, match="no checkpoint at this path"):
        missing.open()
