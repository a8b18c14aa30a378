"""The bundle's decoder in ONNX Runtime against ``LlamaForCausalLM.generate`` on the same embeddings."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is transformers' model")

from helpers.tiny_llava import make_config
from transformers import LlamaForCausalLM

from flashvlm_export.errors import LLMError, SessionError
from flashvlm_export.export.decoder import export_decoder
from flashvlm_export.manifest import DecoderEntry
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.onnxruntime import OnnxRuntimeLLM

WIDTH, NEW_TOKENS = 64, 32
PROMPT_LENGTHS = (1, 2, 5, 17, 64, 190)


@dataclass(frozen=True)
class Exported:
    model: LlamaForCausalLM
    file: Path
    entry: DecoderEntry

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.model.model.embed_tokens.weight.detach().numpy()[ids]

    def engine(self, **options: object) -> OnnxRuntimeLLM:
        return OnnxRuntimeLLM(self.file, self.entry, self.embed, **options)

    def reference(
        self, prompt: np.ndarray, new_tokens: int = NEW_TOKENS, positions: np.ndarray | None = None
    ) -> list[int]:
        embeds = torch.from_numpy(prompt)[None]
        positions = np.arange(len(prompt)) if positions is None else positions
        ids = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            position_ids=torch.from_numpy(positions)[None],
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return ids[0].tolist()

    def reference_logits(self, prompt: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(inputs_embeds=torch.from_numpy(prompt)[None]).logits[0, -1].numpy()


def export(directory: Path, precision: str, *, tied: bool = False) -> Exported:
    """A seeded Llama with two heads per KV head; weights large enough that greedy answers vary."""
    config = make_config(llm_width=WIDTH).text_config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = 1 if "embed_tokens" in name and not tied else parameter.shape[1]
                parameter.normal_(0, 1.2 / fan_in**0.5)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    entry = export_decoder(config, tensors.items(), directory / "llm", precision)
    return Exported(model, directory / entry.file, entry)


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tmp_path_factory.mktemp("fp32"), "fp32")


def prompts() -> list[np.ndarray]:
    random = np.random.default_rng(7)
    return [random.standard_normal((length, WIDTH)).astype(np.float32) for length in PROMPT_LENGTHS]


def answer(engine: OnnxRuntimeLLM, prompt: np.ndarray, new_tokens: int = NEW_TOKENS, **settings: object) -> list[int]:
    params = SamplingParams(max_new_tokens=new_tokens, **settings)
    return list(engine.generate(prompt, params, stop_token_ids=()))


def prefill_logits(engine: OnnxRuntimeLLM, prompt: np.ndarray) -> np.ndarray:
    engine._cache = engine._allocate(len(prompt))
    assert len(engine._cache.arrays) == 2 * engine.entry.num_layers
    return run(engine, prompt, 0).astype(np.float64)


def run(engine: OnnxRuntimeLLM, rows: np.ndarray, past: int) -> np.ndarray:
    """The last logits of rows behind ``past`` others, in the first slot of the cache."""
    total = past + len(rows)
    return engine._run(0, rows[None], np.arange(past, total)[None], np.array([total]))[0]


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.corrcoef(left, right)[0, 1])


def test_greedy_answers_equal_transformers(fp32: Exported) -> None:
    answers = []
    with fp32.engine() as engine:
        for prompt in prompts():
            answers.append(answer(engine, prompt))
            assert answers[-1] == fp32.reference(prompt), f"prompt of {len(prompt)} tokens"
            assert engine.last_run is not None
            assert engine.last_run.prompt_tokens == len(prompt)
            assert engine.last_run.prefill_ms > 0
            assert engine.last_run.decode_ms > 0
    assert all(len(set(tokens)) > 8 for tokens in answers), "dull answers would match anything"


def test_positions_with_gaps_equal_transformers(fp32: Exported) -> None:
    """As pruning leaves them: 40 rows of text, 64 of 576 kept, more text; the answer goes on behind the last."""
    random = np.random.default_rng(3)
    differing = 0
    with fp32.engine() as engine:
        for prompt in [random.standard_normal((120, WIDTH)).astype(np.float32) for _ in range(4)]:
            kept = np.sort(random.choice(576, 64, replace=False)) + 40
            positions = np.concatenate([np.arange(40), kept, np.arange(616, 632)])
            params = SamplingParams(max_new_tokens=NEW_TOKENS)
            tokens = list(engine.generate(prompt, params, stop_token_ids=(), positions=positions))
            assert tokens == fp32.reference(prompt, positions=positions)
            differing += tokens != answer(engine, prompt)
        assert differing >= 3, "positions that hardly make a difference"
        with pytest.raises(LLMError, match="at most 1024 together"):
            engine.generate(prompt, SamplingParams(max_new_tokens=1025 - 632), stop_token_ids=(), positions=positions)


def test_tied_embeddings(tmp_path: Path) -> None:
    exported = export(tmp_path, "fp32", tied=True)
    with exported.engine() as engine:
        for prompt in prompts()[::2]:
            assert answer(engine, prompt) == exported.reference(prompt)


def test_prefill_logits(fp32: Exported) -> None:
    with fp32.engine() as engine:
        for prompt in prompts():
            expected = fp32.reference_logits(prompt)
            # float32 on both sides, sums in another order: 3e-6 of logits around 4 was measured.
            np.testing.assert_allclose(prefill_logits(engine, prompt), expected, rtol=0, atol=1e-4)


def test_fp16(tmp_path: Path) -> None:
    exported = export(tmp_path, "fp16")
    with exported.engine() as engine:
        for prompt in prompts():
            # Rounding to 11 bits is an error of 3e-4 per operation, and about 20 follow each other: below 1 per cent
            # of the logits' spread, hence a correlation above 1 - 0.01 ** 2 / 2 (0.999998 was measured).
            actual = prefill_logits(engine, prompt)
            assert correlation(actual, exported.reference_logits(prompt)) > 0.9999
            assert len(answer(engine, prompt)) == NEW_TOKENS
        with pytest.raises(LLMError, match="65504"):
            answer(engine, np.full((2, WIDTH), 7e4, np.float32))


def test_int8(tmp_path: Path, fp32: Exported) -> None:
    exported = export(tmp_path, "int8")
    with exported.engine() as engine:
        for prompt in prompts():
            # 256 levels instead of 16: a sixteenth of the noise that int4 has below, 1 to 2 per cent.
            actual = prefill_logits(engine, prompt)
            assert 0.999 < correlation(actual, exported.reference_logits(prompt)) < 0.9999999
            assert len(answer(engine, prompt)) == NEW_TOKENS
    sizes = [each.file.with_suffix(".onnx.data").stat().st_size for each in (exported, fp32)]
    assert sizes[1] / 4 < sizes[0] < sizes[1] / 2


def test_int4(tmp_path: Path, fp32: Exported) -> None:
    exported = export(tmp_path, "int4")
    with exported.engine() as engine:
        for prompt in prompts():
            # 16 levels per block of 32 leave some 9 per cent of noise in every weight matrix, 13 of which follow each
            # other, partly side by side with the residual: 15 to 30 per cent of the logits' spread, a correlation of
            # 0.96 to 0.99 when measured. Random weights are the worst case; a wrong scale or layout gives about 0.
            actual = prefill_logits(engine, prompt)
            assert 0.9 < correlation(actual, exported.reference_logits(prompt)) < 0.9999
            assert len(answer(engine, prompt)) == NEW_TOKENS
    sizes = [each.file.with_suffix(".onnx.data").stat().st_size for each in (exported, fp32)]
    assert sizes[0] < sizes[1] / 2


def test_the_cache_buffer_may_hold_anything_at_first(fp32: Exported) -> None:
    """Positions that are not written yet must not count, not even as 0 × NaN."""
    prompt = prompts()[3]
    with fp32.engine() as engine:
        engine._cache = engine._allocate(len(prompt) + 8)
        for array in engine._cache.arrays:
            array.fill(np.nan)
        logits = run(engine, prompt, 0)
        np.testing.assert_allclose(logits, fp32.reference_logits(prompt), rtol=0, atol=1e-4)


def test_the_cache_is_written_in_place(fp32: Exported) -> None:
    with fp32.engine() as engine:
        engine._cache = cache = engine._allocate(24)
        run(engine, prompts()[3], 0)
        run(engine, prompts()[0], 17)
        written = engine._binding(0, 1).get_outputs()[1:]
        assert {value.data_ptr() for value in written} == {array.ctypes.data for array in cache.arrays}
        assert len(written) == len(cache.arrays)
        for array in cache.arrays:
            used = np.abs(array).sum(axis=(0, 1, 3)) > 0
            assert used.tolist() == [True] * 18 + [False] * 6


def test_a_prompt_that_begins_alike_is_not_computed_again(fp32: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next prompt holds the answer, needs more room, or stands elsewhere from some row on."""
    first = prompts()[4]
    with fp32.engine() as engine:
        engine.reuse_prefix = True
        computed: list[int] = []
        whole = engine._run
        monkeypatch.setattr(
            engine, "_run", lambda slot, rows, *rest: computed.append(rows.shape[1]) or whole(slot, rows, *rest)
        )
        said = fp32.embed(np.array(fp32.reference(first)))
        turn = np.concatenate([first, said, prompts()[3]])
        # All of the answer but its last token, whose row nothing was computed from, is known.
        for rows, known in ((first, 0), (first, 63), (turn, 64 + NEW_TOKENS - 1), (first[:20], 19), (prompts()[5], 0)):
            computed.clear()
            assert answer(engine, rows) == fp32.reference(rows)
            assert computed[0] == len(rows) - known
            assert engine.last_run is not None
            assert engine.last_run.reused_tokens == known
        moved = np.arange(64) + (np.arange(64) > 40) * 7
        assert answer(engine, first) == fp32.reference(first)
        params = SamplingParams(max_new_tokens=NEW_TOKENS)
        tokens = list(engine.generate(first, params, stop_token_ids=(), positions=moved))
        assert tokens == fp32.reference(first, positions=moved)
        assert engine.last_run.reused_tokens == 41
        engine.reuse_prefix = False
        assert answer(engine, first) == fp32.reference(first)
        assert engine.last_run.reused_tokens == 0


def test_the_cache_outlives_whatever_the_reader_allocates(fp32: Exported) -> None:
    """ONNX Runtime borrows NumPy's memory; a buffer freed too early would soon hold something of the reader's."""
    prompt = prompts()[3]
    shape = (1, fp32.entry.num_kv_heads, len(prompt) + NEW_TOKENS, fp32.entry.head_size)
    tokens, junk = [], []
    with fp32.engine() as engine:
        for token in engine.generate(prompt, SamplingParams(max_new_tokens=NEW_TOKENS), stop_token_ids=()):
            tokens.append(token)
            junk.extend(np.full(shape, np.nan, np.float32) for _ in range(4 * fp32.entry.num_layers))
    assert tokens == fp32.reference(prompt)


def test_stop_tokens_and_length(fp32: Exported) -> None:
    prompt = prompts()[2]
    expected = fp32.reference(prompt)
    stop = expected[6]
    with fp32.engine() as engine:
        params = SamplingParams(max_new_tokens=NEW_TOKENS)
        until = list(engine.generate(prompt, params, stop_token_ids={stop, 319}))
        assert until == expected[: expected.index(stop)]
        assert engine.last_run is not None
        assert engine.last_run.finish_reason == "stop"
        assert answer(engine, prompt, 1) == expected[:1]
        assert engine.last_run.finish_reason == "length"


def test_the_whole_context_can_be_used_and_no_more(fp32: Exported) -> None:
    prompt = np.random.default_rng(1).standard_normal((1020, WIDTH)).astype(np.float32)
    with fp32.engine() as engine:
        assert answer(engine, prompt, 4) == fp32.reference(prompt, 4)
        with pytest.raises(LLMError, match="at most 1024 together"):
            answer(engine, prompt, 5)


def test_wrong_width_and_nan(fp32: Exported) -> None:
    with fp32.engine() as engine:
        with pytest.raises(LLMError, match="64"):
            answer(engine, np.ones((3, 48), np.float32))
        with pytest.raises(LLMError, match="NaN"):
            answer(engine, np.full((3, WIDTH), np.nan, np.float32))


def test_half_precision_prompts_are_taken(fp32: Exported) -> None:
    prompt = prompts()[3].astype(np.float16)
    with fp32.engine() as engine:
        assert answer(engine, prompt) == fp32.reference(prompt.astype(np.float32))


def test_early_close_then_another_answer(fp32: Exported) -> None:
    first, second = prompts()[2:4]
    with fp32.engine() as engine:
        stream = engine.generate(first, SamplingParams(), stop_token_ids=())
        assert [next(stream) for _ in range(3)] == fp32.reference(first)[:3]
        stream.close()
        assert answer(engine, second) == fp32.reference(second), "the first answer's cache was seen"


def test_seeded_sampling(fp32: Exported) -> None:
    prompt = prompts()[2]
    settings = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    with fp32.engine() as engine:
        answers = [answer(engine, prompt, seed=seed, **settings) for seed in (1, 1, 2)]
        assert answers[0] == answers[1] != answers[2]
        assert answer(engine, prompt, temperature=1.0, top_k=1) == fp32.reference(prompt)


def test_constructing_is_free_and_a_closed_engine_says_so(tmp_path: Path, fp32: Exported) -> None:
    engine = OnnxRuntimeLLM(tmp_path / "nothing.onnx", fp32.entry, fp32.embed)
    with pytest.raises(LLMError, match="not open"):
        engine.generate(prompts()[0], SamplingParams(), stop_token_ids=())
    with pytest.raises(SessionError, match=r"nothing\.onnx"):
        engine.open()


def test_threads(fp32: Exported) -> None:
    with fp32.engine(threads=1) as engine:
        assert answer(engine, prompts()[2]) == fp32.reference(prompts()[2])


def test_a_provider_that_is_not_there_is_an_error(fp32: Exported) -> None:
    with pytest.raises(SessionError, match="NoSuchExecutionProvider"):
        fp32.engine(providers=("NoSuchExecutionProvider", "CPUExecutionProvider")).open()


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"num_kv_heads": 4}])
def test_a_decoder_that_is_not_the_manifests(fp32: Exported, change: dict[str, int]) -> None:
    entry = dataclasses.replace(fp32.entry, **change)
    with pytest.raises(SessionError, match="manifest"):
        OnnxRuntimeLLM(fp32.file, entry, fp32.embed).open()


def test_neither_torch_nor_transformers_is_imported(fp32: Exported) -> None:
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from flashvlm_export.manifest import DecoderEntry\n"
        "from flashvlm_export.runtime.llm.base import SamplingParams\n"
        "from flashvlm_export.runtime.llm.onnxruntime import OnnxRuntimeLLM\n"
        "assert 'onnxruntime' not in sys.modules, 'heavy before it is needed'\n"
        f"entry = DecoderEntry(**{dataclasses.asdict(fp32.entry)})\n"
        f"engine = OnnxRuntimeLLM(Path({str(fp32.file)!r}), entry, lambda ids: np.ones((len(ids), {WIDTH}), 'f4'))\n"
        "with engine:\n"
        f"    prompt = np.ones((3, {WIDTH}), 'f4')\n"
        "    assert len(list(engine.generate(prompt, SamplingParams(max_new_tokens=2), stop_token_ids=()))) == 2\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_answers_under_way_at_once_are_those_of_each_alone(fp32: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different lengths, in slots that others had before, with a cache that grows meanwhile."""
    waiting = list(zip(range(6), (prompts()[i] for i in (3, 4, 2, 5, 1, 0)), (9, 32, 5, 32, 12, 30), strict=True))
    expected = {name: fp32.reference(prompt, count) for name, prompt, count in waiting}
    said: dict[int, list[int]] = {name: [] for name in expected}
    streams: dict[int, Generator[int, None, None]] = {}
    runs: list[tuple[int, ...]] = []
    with fp32.engine() as engine:
        engine.max_answers = 3
        run = engine._run
        monkeypatch.setattr(engine, "_run", lambda slot, rows, *rest: runs.append(rows.shape) or run(slot, rows, *rest))
        while waiting or streams:
            if waiting and len(streams) < 3:
                name, prompt, count = waiting.pop(0)
                streams[name] = engine.generate(prompt, SamplingParams(max_new_tokens=count), stop_token_ids=())
            for name in list(streams):
                token = next(streams[name], None)
                if token is None:
                    del streams[name]
                else:
                    said[name].append(token)
    assert said == expected
    # One run for each prompt, and fewer for the rest than tokens: answers were not computed one by one.
    assert len(runs) < sum(map(len, said.values())) * 0.6


def test_an_answer_that_ends_leaves_the_others_alone(fp32: Exported) -> None:
    """Closed, stopped, one that its reader leaves waiting, and one too many."""
    prompt, other = prompts()[3], prompts()[2]
    expected = fp32.reference(prompt)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    with fp32.engine() as engine:
        engine.max_answers = 3
        left, closed, stopped = (
            engine.generate(rows, params, stop_token_ids=stop)
            for rows, stop in ((prompt, ()), (other, ()), (prompt, {expected[4]}))
        )
        said = [next(left)]
        next(closed)
        assert list(stopped) == expected[: expected.index(expected[4])]
        assert engine.last_run is not None
        assert engine.last_run.finish_reason == "stop"
        too_many = [engine.generate(prompt, params, stop_token_ids=()) for _ in range(2)]
        next(too_many[0])
        with pytest.raises(LLMError, match="3 still being read"):
            next(too_many[1])
        too_many[0].close()
        closed.close()
        assert said + list(left) == expected


def test_a_cache_that_no_memory_holds_is_refused(fp32: Exported) -> None:
    with fp32.engine() as engine:
        engine.max_answers = 10**9
        with pytest.raises(LLMError, match=r"\d+ bytes for 1000000000 answer\(s\) of 98 positions"):
            answer(engine, prompts()[3])
        engine.max_answers = 2
        assert answer(engine, prompts()[3]) == fp32.reference(prompts()[3])


def test_time_spent_while_another_answer_was_asked_for_counts(fp32: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_new_tokens=4)
    with fp32.engine() as engine:
        engine.max_answers = 2
        run = engine._run
        monkeypatch.setattr(engine, "_run", lambda *given: (time.sleep(0.1), run(*given))[1])
        first, second = (engine.generate(prompts()[1], params, stop_token_ids=()) for _ in range(2))
        spent = []
        for _ in range(4):
            next(first)
            next(second)
        for stream in (first, second):
            assert next(stream, None) is None
            assert engine.last_run is not None
            spent.append(engine.last_run.decode_ms)
    # Three steps of 100 ms and a bit, which both answers took part in; counted twice, they would be six.
    assert 300 <= min(spent) <= max(spent) < 550
