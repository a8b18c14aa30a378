"""The engine 'transformers' against ``generate`` of the same library, which it does not call."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="the engine runs in it")

from helpers.tiny_llava import make_talkative_llama
from transformers import LlamaForCausalLM

from flashvlm_export.errors import LLMError, SessionError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.transformers import TransformersLLM

WIDTH, NEW_TOKENS = 64, 24


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_talkative_llama(WIDTH)


@pytest.fixture(scope="module")
def checkpoint(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model alone, without an image in sight."""
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    return directory


def prompts() -> list[tuple[np.ndarray, np.ndarray]]:
    """Embeddings and positions, counted or with gaps."""
    random = np.random.default_rng(5)
    lengths = (1, 3, 30, 120)
    rows = [random.standard_normal((length, WIDTH)).astype(np.float32) for length in lengths]
    counted = [np.arange(length) for length in lengths]
    gaps = [np.sort(random.choice(700, length, replace=False)) for length in lengths]
    return [*zip(rows, counted, strict=True), *zip(rows, gaps, strict=True)]


def reference(model: LlamaForCausalLM, rows: np.ndarray, positions: np.ndarray) -> list[int]:
    ids = model.generate(
        inputs_embeds=torch.from_numpy(rows)[None],
        position_ids=torch.from_numpy(positions)[None],
        attention_mask=torch.ones(1, len(rows), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[0].tolist()


def test_greedy_answers(checkpoint: Path, model: LlamaForCausalLM) -> None:
    with TransformersLLM(checkpoint) as engine:
        for rows, positions in prompts():
            params = SamplingParams(max_new_tokens=NEW_TOKENS)
            tokens = list(engine.generate(rows, params, stop_token_ids=(), positions=positions))
            assert tokens == reference(model, rows, positions)
            assert len(set(tokens)) > 6, "dull answers would match anything"
        assert engine.last_run is not None
        assert engine.last_run.new_tokens == NEW_TOKENS
        assert engine.last_run.prefill_ms > 0
        assert engine.limits.vocab_size == 320


def test_sampling_half_precision_and_the_end_of_the_context(checkpoint: Path, model: LlamaForCausalLM) -> None:
    rows, positions = prompts()[2]
    with TransformersLLM(checkpoint, threads=1) as engine:
        one = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, top_k=1)
        expected = reference(model, rows, positions)
        assert list(engine.generate(rows, one, stop_token_ids=())) == expected
        half = rows.astype(np.float16)
        again = list(engine.generate(half, SamplingParams(max_new_tokens=NEW_TOKENS), stop_token_ids=()))
        assert again == reference(model, half.astype(np.float32), positions)
        with pytest.raises(LLMError, match="at most 1024 together"):
            engine.generate(rows, SamplingParams(max_new_tokens=995), stop_token_ids=())


def test_what_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(SessionError, match="nothing"):
        TransformersLLM(tmp_path / "nothing").open()
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    weights = load_file(cut / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SessionError, match=r"1 weights are missing, model\.layers\.0\.mlp\.up_proj\.weight for one"):
        TransformersLLM(cut).open()
    (cut / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-999])
    with pytest.raises(SessionError, match="cannot load"):
        TransformersLLM(cut).open()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SessionError, match=r"config\.json and all weights"):
        TransformersLLM(tmp_path).open()
