"""Every engine gives the same greedy answer to a pruned prompt, or parts where two tokens are all but equal.

``FLASHVLM_VLLM_URL`` names a vLLM server of the same language model in float32, ``FLASHVLM_VLLM_TEXT`` a checkpoint of
it where vLLM itself is installed (``make vllm-lane`` sets both); llama.cpp takes part where it is installed
(``make llamacpp-lane`` installs it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from transformers import AutoModelForImageTextToText

from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.vllm_offline import VllmOfflineLLM
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import PrunedPrompt, Request

NEW_TOKENS = 32
PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket", "camera", "coins")
QUESTIONS = ("What is in the picture?", "Is there a cat, and what does it do?")
# Sums of a few hundred float32 products, in another order: 3e-6 of the largest logit were measured. Two tokens closer
# than some thirty times that can change places.
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def prompts(tiny_bundle: Path) -> list[PrunedPrompt]:
    """Twelve, at 7 of 16 visual tokens, and one without an image."""
    with Pipeline.open(tiny_bundle, precision="fp32", llm=None) as vlm:
        requests = [Request([getattr(skimage.data, name)()], text) for name in PHOTOGRAPHS for text in QUESTIONS]
        return vlm.encode([*requests, Request([], "Who are you?")], budget=7)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["onnxruntime", "transformers", "llamacpp", "vllm", "vllm offline"])
def engine(
    request: pytest.FixtureRequest, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pipeline]:
    where = ""
    if request.param == "transformers":
        where = f":{tiny_checkpoint}"
    elif request.param == "llamacpp":
        pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: make llamacpp-lane")
        from helpers.gguf_llama import write_gguf

        where = f":{write_gguf(tiny_checkpoint, tmp_path_factory.mktemp('gguf') / 'tiny.gguf')}"
    elif request.param == "vllm":
        if "FLASHVLM_VLLM_URL" not in os.environ:
            pytest.skip("no vLLM server is running: make vllm-lane")
        where = f":{os.environ['FLASHVLM_VLLM_URL']}"
    elif request.param == "vllm offline":
        if "FLASHVLM_VLLM_TEXT" not in os.environ:
            pytest.skip("needs an environment with vLLM: make vllm-lane")
        with Pipeline.open(tiny_bundle, llm=None) as vlm:
            text, options = Path(os.environ["FLASHVLM_VLLM_TEXT"]), {"enforce_eager": True}
            vlm.llm = VllmOfflineLLM(text, vlm.embeddings.lookup, vlm.embeddings.vocab_size, options=options)
            vlm.load()
            yield vlm
        return
    with Pipeline.open(tiny_bundle, llm=request.param + where) as vlm:
        yield vlm


def logits_after(model: Any, prompt: PrunedPrompt, tokens: list[int]) -> np.ndarray:
    """What transformers thinks of the token behind ``tokens``, ``[vocab]``."""
    rows = torch.from_numpy(prompt.inputs_embeds)[None]
    said = model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
    with torch.no_grad():
        return model(inputs_embeds=torch.cat([rows, said], dim=1)).logits[0, -1].numpy()


def test_greedy_answers_agree(engine: Pipeline, prompts: list[PrunedPrompt], model: Any) -> None:
    """Each token has to be the likeliest of what transformers computes from all before it, or all but equal to it."""
    stop = engine.bundle.manifest.prompt.eos_token_ids
    near_ties = lengths = 0
    for prompt in prompts:
        answer = engine.answer(prompt, SamplingParams(max_new_tokens=NEW_TOKENS))
        tokens = answer.token_ids + (stop[:1] if answer.stats.finish_reason == "stop" else [])
        lengths += len(tokens)
        for number, token in enumerate(tokens):
            logits = logits_after(model, prompt, tokens[:number])
            margin = float(logits.max() - logits[token])
            assert margin <= NEAR_TIE * np.abs(logits).max(), (
                f"token {number} of {tokens}: {margin} behind the likeliest"
            )
            near_ties += margin > 0
        assert answer.stats.new_tokens == len(answer.token_ids)
        assert answer.stats.prefill_ms > 0
    assert lengths > 12 * NEW_TOKENS / 4, "answers too short to tell"
    assert near_ties <= 2, "closer than 1e-4 of the largest of 320 logits they come about once in a thousand tokens"
