"""A real vLLM server (``make vllm-lane``): what the engine ``vllm`` needs of it, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashvlm_export.errors import LLMError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.vllm import VllmLLM
from flashvlm_export.runtime.pipeline import Pipeline

URL = os.environ.get("FLASHVLM_VLLM_URL")
pytestmark = pytest.mark.skipif(URL is None, reason="no vLLM server is running: make vllm-lane")


@pytest.fixture
def vlm(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, llm=f"vllm:{URL}") as opened:
        yield opened


def test_vllm_settings_reach_the_server(vlm: Pipeline) -> None:
    assert vlm.llm is not None
    rows = np.random.default_rng(0).standard_normal((9, vlm.embeddings.width)).astype(np.float32)
    greedy = list(vlm.llm.generate(rows, SamplingParams(max_new_tokens=12), stop_token_ids=()))
    assert len(greedy) == 12
    again = list(vlm.llm.generate(rows, SamplingParams(max_new_tokens=12, temperature=1, top_k=1), stop_token_ids=()))
    assert again == greedy
    until = list(vlm.llm.generate(rows, SamplingParams(max_new_tokens=12), stop_token_ids=[greedy[4]]))
    assert until == greedy[: greedy.index(greedy[4])]
    assert vlm.llm.last_run is not None
    assert vlm.llm.last_run.finish_reason == "stop"
    draws = [
        list(vlm.llm.generate(rows, SamplingParams(max_new_tokens=12, temperature=1, seed=seed), stop_token_ids=()))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    stream = vlm.llm.generate(rows, SamplingParams(max_new_tokens=500), stop_token_ids=())
    assert [next(stream), next(stream)] == greedy[:2]
    stream.close()
    assert list(vlm.llm.generate(rows, SamplingParams(max_new_tokens=3), stop_token_ids=())) == greedy[:3]


def test_vllm_with_other_embeddings_is_refused(vlm: Pipeline) -> None:
    assert URL is not None
    engine = VllmLLM(URL, lambda ids: -vlm.embeddings.lookup(ids), vlm.embeddings.vocab_size)
    with pytest.raises(LLMError, match="not the one that the bundle was exported with"):
        engine.open()
