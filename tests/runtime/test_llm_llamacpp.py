"""llama.cpp on a file in float32 against transformers' ``generate``; ``make llamacpp-lane`` installs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: make llamacpp-lane")
torch = pytest.importorskip("torch", reason="the oracle is transformers' model")

from helpers.gguf_llama import write_gguf
from helpers.tiny_llava import make_talkative_llama
from transformers import LlamaForCausalLM

from flashvlm_export.errors import LLMError, SessionError, UsageError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.llamacpp import LlamaCppLLM

WIDTH, NEW_TOKENS = 64, 24


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_talkative_llama(WIDTH)


@pytest.fixture(scope="module")
def file(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    return write_gguf(directory, directory / "text.gguf")


def engine_of(file: Path, model: LlamaForCausalLM, **options: Any) -> LlamaCppLLM:
    table = model.get_input_embeddings().weight.detach().numpy()
    return LlamaCppLLM(file, lambda ids: table[ids], **options)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, WIDTH)).astype(np.float32)


def reference(model: LlamaForCausalLM, rows: np.ndarray) -> list[int]:
    ids = model.generate(
        inputs_embeds=torch.from_numpy(rows)[None],
        attention_mask=torch.ones(1, len(rows), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[0].tolist()


def answer(engine: LlamaCppLLM, rows: np.ndarray, count: int = NEW_TOKENS) -> list[int]:
    return list(engine.generate(rows, SamplingParams(max_new_tokens=count), stop_token_ids=()))


def test_greedy_answers(file: Path, model: LlamaForCausalLM) -> None:
    with engine_of(file, model, threads=1) as engine:
        assert engine.limits.width == WIDTH
        assert engine.limits.vocab_size == 320
        for length in (1, 3, 40, 300, 900):  # beyond the 512 rows of one of llama.cpp's batches
            tokens = answer(engine, prompt(length))
            assert tokens == reference(model, prompt(length))
            assert len(set(tokens)) > 6, "dull answers would match anything"


def test_a_prompt_that_begins_alike_is_not_computed_again(
    file: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prompt(50)
    second = np.concatenate([first[:30], prompt(15, seed=1)])
    computed: list[int] = []
    with engine_of(file, model) as engine:
        engine.reuse_prefix = True
        run = engine._run
        monkeypatch.setattr(
            engine, "_run", lambda places, **given: computed.append(len(places)) or run(places, **given)
        )
        said = model.get_input_embeddings().weight.detach().numpy()[reference(model, first)]
        turn = np.concatenate([first, said, prompt(9, seed=3)])
        # All of the answer but its last token, whose row nothing was computed from, is known.
        asked = [(first, 50), (second, 15), (second, 1), (first, 20), (turn, 10), (first[:10], 1), (prompt(20, 2), 20)]
        for rows, expected in asked:
            computed.clear()
            assert answer(engine, rows) == reference(model, rows)
            assert computed[0] == expected
            assert engine.last_run is not None
            assert engine.last_run.reused_tokens == len(rows) - expected
        stream = engine.generate(first, SamplingParams(max_new_tokens=9), stop_token_ids=())
        next(stream)
        stream.close()
        assert answer(engine, second) == reference(model, second), "behind an answer that was left"
        engine.reuse_prefix = False
        computed.clear()
        assert answer(engine, second) == reference(model, second)
        assert computed[0] == 45


def test_answers_under_way_at_once(file: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun one after the other, in slots that others had before; then one alone again, which keeps its beginning."""
    prompts = [prompt(length, seed=length) for length in (40, 3, 200, 17, 64)]
    computed: list[int] = []
    with engine_of(file, model) as engine:
        engine.max_answers = 3
        run = engine._run
        monkeypatch.setattr(
            engine, "_run", lambda places, **given: computed.append(len(places)) or run(places, **given)
        )
        said: dict[int, list[int]] = {}
        streams: dict[int, Any] = {}
        waiting = list(enumerate(prompts))
        while waiting or streams:
            if waiting and len(streams) < 3:
                name, rows = waiting.pop(0)
                params = SamplingParams(max_new_tokens=NEW_TOKENS - 3 * name)
                streams[name], said[name] = engine.generate(rows, params, stop_token_ids=()), []
            for name in list(streams):
                token = next(streams[name], None)
                if token is None:
                    del streams[name]
                else:
                    said[name].append(token)
        for name, rows in enumerate(prompts):
            assert said[name] == reference(model, rows)[: NEW_TOKENS - 3 * name]
        assert computed.count(3) > 10, "answers were computed one by one"
        engine.max_answers, engine.reuse_prefix = 1, True
        for _ in range(2):
            assert answer(engine, prompts[0]) == reference(model, prompts[0])
        assert engine.last_run is not None
        assert engine.last_run.reused_tokens == 39


def test_rows_of_the_table_and_the_context(file: Path, model: LlamaForCausalLM) -> None:
    ids = np.array([0, 7, 319])
    with engine_of(file, model, context=64) as engine:
        np.testing.assert_array_equal(engine.embedding_rows(ids), model.get_input_embeddings().weight.detach()[ids])
        assert engine.limits.max_positions == 64
        assert len(answer(engine, prompt(40), 24)) == 24
        with pytest.raises(LLMError, match="at most 64 together"):
            answer(engine, prompt(40), 25)
        with pytest.raises(UsageError, match="'llamacpp' counts positions by itself"):
            engine.generate(prompt(2), SamplingParams(), stop_token_ids=(), positions=np.array([0, 9]))
        one = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, top_k=1)
        assert list(engine.generate(prompt(3), one, stop_token_ids=())) == reference(model, prompt(3))


def test_what_is_no_model(tmp_path: Path, file: Path, model: LlamaForCausalLM) -> None:
    with pytest.raises(SessionError, match="no GGUF file"):
        engine_of(tmp_path / "nothing.gguf", model).open()
    (tmp_path / "text.gguf").write_bytes(b"text")
    with pytest.raises(SessionError, match="cannot load"):
        engine_of(tmp_path / "text.gguf", model).open()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(SessionError, match="cannot load"):
        engine_of(cut, model).open()
    with pytest.raises(SessionError, match="GGML_CUDA"):
        engine_of(file, model, gpu=True).open()
