"""The client of a vLLM server against one that answers with a torch model; ``tests/vllm_lane.sh`` has the real one."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the server of these tests runs in it")

from helpers.completions_server import Served, serve
from helpers.tiny_llava import make_talkative_llama
from transformers import LlamaForCausalLM

from flashvlm_export.errors import LLMError, UsageError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.torch_file import torch_bytes
from flashvlm_export.runtime.llm.vllm import VllmLLM

WIDTH = 64
_SENT = ("temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "repetition_penalty")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_talkative_llama(WIDTH)


@pytest.fixture
def served(model: LlamaForCausalLM) -> Iterator[Served]:
    with serve(model) as running:
        yield running


def engine(served: Served, *, timeout_s: float = 10, scale: float = 1.0) -> VllmLLM:
    table = scale * served.model.get_input_embeddings().weight.detach().numpy()
    return VllmLLM(served.url, lambda ids: table[ids], len(table), timeout_s=timeout_s)


def prompt(length: int = 20) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((length, WIDTH)).astype(np.float32)


def answer(llm: VllmLLM, rows: np.ndarray, count: int = 12, stop: tuple[int, ...] = ()) -> list[int]:
    return list(llm.generate(rows, SamplingParams(max_new_tokens=count), stop_token_ids=stop))


def expected(served: Served, rows: np.ndarray, count: int = 12) -> list[int]:
    return [token for token, _ in served.tokens(torch.from_numpy(rows), count)]


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,), (2, 3, 4), (0, 5)])
def test_torch_reads_what_is_written(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for given in (array, array.T, array.astype(np.float64)):
        read = torch.load(io.BytesIO(torch_bytes(given)), weights_only=True)
        assert read.dtype == torch.float32
        np.testing.assert_array_equal(read.numpy(), given.astype(np.float32))


def test_answers_and_settings(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with engine(served) as llm:
        assert (llm.limits.width, llm.limits.max_positions, llm.limits.vocab_size) == (WIDTH, 64, 320)
        for length in (1, 20, 40):
            assert answer(llm, prompt(length)) == expected(served, prompt(length))
        assert len(set(answer(llm, prompt()))) > 6, "dull answers would match anything"
        whole = expected(served, prompt())
        assert answer(llm, prompt(), stop=(whole[5],)) == whole[: whole.index(whole[5])]
        assert llm.last_run is not None
        assert llm.last_run.finish_reason == "stop"
        params = SamplingParams(max_new_tokens=3, temperature=0.5, top_k=7, top_p=0.9, seed=4)
        list(llm.generate(prompt(), params, stop_token_ids=(5, 2)))
        sent = served.requests[-1]
        assert {name: sent[name] for name in _SENT} == {
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.9,
            "seed": 4,
            "stop_token_ids": [2, 5],
            "ignore_eos": True,
            "repetition_penalty": 1.0,
        }
        assert (sent["model"], sent["authorization"]) == ("tiny", "Bearer secret")
        with pytest.raises(LLMError, match="at most 64 together"):
            answer(llm, prompt(60))


def test_a_server_that_is_busy_is_asked_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with engine(served) as llm:
        served.faults = ["busy", "busy"]
        assert answer(llm, prompt()) == expected(served, prompt())
        served.faults = ["busy"] * 3
        with pytest.raises(LLMError, match=r"503.*later"):
            answer(llm, prompt())


@pytest.mark.parametrize(
    ("fault", "message", "tokens_before"),
    [
        ("break", "broke off the answer", 3),
        ("error event", "the engine died", 3),
        ("text alone", r"(?s)answers in text alone.*return_token_ids", 0),
        ("drop", "broke off the answer", 0),
        ("flag", "--enable-prompt-embeds", 0),
        ("key", "VLLM_API_KEY", 0),
    ],
)
def test_answers_that_break_off_are_not_asked_again(
    served: Served, fault: str, message: str, tokens_before: int
) -> None:
    with engine(served) as llm:
        served.requests.clear()
        served.faults = [fault]
        tokens: list[int] = []
        stream = llm.generate(prompt(), SamplingParams(max_new_tokens=12), stop_token_ids=())
        with pytest.raises(LLMError, match=message):
            tokens.extend(stream)
        assert len(served.requests) == 1
        assert tokens == expected(served, prompt())[:tokens_before]
        assert answer(llm, prompt()) == expected(served, prompt()), "the next answer"


def test_silence_ends(served: Served) -> None:
    with engine(served, timeout_s=0.5) as llm:
        served.faults = ["silence"]
        with pytest.raises(LLMError, match=r"no silence longer than 0\.5 s"):
            answer(llm, prompt())


def test_early_close_then_another_answer(served: Served) -> None:
    with engine(served) as llm:
        stream = llm.generate(prompt(), SamplingParams(max_new_tokens=12), stop_token_ids=())
        first = [next(stream), next(stream)]
        stream.close()
        assert first == expected(served, prompt())[:2]
        assert answer(llm, prompt(5)) == expected(served, prompt(5))


def test_no_server_another_server_and_no_flag(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = VllmLLM(f"http://127.0.0.1:{unused.getsockname()[1]}/v1", lambda ids: prompt(len(ids)), 320)
        with pytest.raises(LLMError, match=r"(?s)cannot be reached.*vllm serve TEXT --enable-prompt-embeds"):
            nobody.open()
    elsewhere = engine(served)
    elsewhere.url = elsewhere.url.removesuffix("/v1")
    with pytest.raises(LLMError, match=r"(?s)404.*give the address"):
        elsewhere.open()
    served.faults = ["", "flag"]
    with pytest.raises(LLMError, match=r"(?s)400.*what to do: vllm serve"):
        engine(served).open()
    served.faults = ["no logprobs"]
    with pytest.raises(LLMError, match="broke off"):
        engine(served).open()


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "http://localhost:port/v1", "ftp://localhost/v1", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        VllmLLM(url, lambda ids: prompt(len(ids)), 320)


def test_a_server_with_another_model_is_refused(served: Served) -> None:
    with pytest.raises(LLMError, match=r"(?s)not the one that the bundle.*tiny says"):
        engine(served, scale=-1.0).open()


def test_several_answers_are_under_way_each_over_its_own_connection(served: Served) -> None:
    """The second breaks off half-way, which leaves the others alone."""
    with engine(served) as llm:
        llm.max_answers = 3
        served.faults[:] = ["", "break", ""]
        prompts = [prompt(length) for length in (5, 20, 33)]
        streams = [llm.generate(rows, SamplingParams(max_new_tokens=12), stop_token_ids=()) for rows in prompts]
        said = [[next(stream)] for stream in streams]
        with pytest.raises(LLMError, match="broke off"):
            list(streams[1])
        for place in (2, 0):
            said[place].extend(streams[place])
            assert said[place] == expected(served, prompts[place])
