"""The server against OpenAI's own client: every answer is the one that the pipeline gives."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
openai = pytest.importorskip("openai", reason="the tests of the server ask with OpenAI's client")

from helpers.serving import Process, data_uri, png, serving, user

from flashvlm_export.runtime.layout import ImageLayout
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Answer, Exchange, PrunedPrompt, Pruning, Request, SelectedImage
from flashvlm_export.runtime.server.answering import KeptTokens, kept_tokens

MODEL = "tiny-llava"
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Process]:
    with serving(tiny_bundle, "--precision", "fp32", "--threads", "1", "--name", MODEL) as process:
        yield process


@pytest.fixture(scope="module")
def client(served: Process) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def vlm(tiny_bundle: Path) -> Iterator[Pipeline]:
    selectors = ["flashvlm", "divprune", "cdpruner"]
    with Pipeline.open(tiny_bundle, precision="fp32", threads=1, selectors=selectors) as opened:
        yield opened


def alone(vlm: Pipeline, request: Request, pruning: Pruning, params: SamplingParams) -> Answer:
    """The pipeline's own answer."""
    return vlm.answer(vlm.encode_each([(request, pruning)])[0], params)


def ask(client: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    ours = ("token_budget", "selector", "text_span", "positions", "selection", "top_k")
    extra = {name: options.pop(name) for name in ours if name in options}
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **options)


@pytest.mark.parametrize(
    ("options", "pruning", "params"),
    [
        ({}, Pruning(), SamplingParams(256)),
        ({"token_budget": 3, "max_tokens": 9}, Pruning(3), SamplingParams(9)),
        ({"token_budget": "full", "max_completion_tokens": 8}, Pruning(16), SamplingParams(8)),
        (
            {
                "token_budget": 4,
                "selector": "divprune",
                "text_span": "question",
                "positions": "original",
                "max_tokens": 12,
            },
            Pruning(4, "question", "original", "divprune"),
            SamplingParams(12),
        ),
        (
            {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 7, "max_tokens": 20},
            Pruning(),
            SamplingParams(20, 0.9, 20, 0.8, 7),
        ),
    ],
)
def test_answer_and_counts_are_the_pipelines(
    client: Any, vlm: Pipeline, options: dict[str, Any], pruning: Pruning, params: SamplingParams
) -> None:
    expected = alone(vlm, Request([png(1)], QUESTION), pruning, params)
    got = ask(client, [user(QUESTION, png(1))], selection=True, **options)
    assert (got.object, got.model, len(got.choices)) == ("chat.completion", MODEL, 1)
    choice = got.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.stats.finish_reason
    usage = got.usage
    assert usage.prompt_tokens == expected.stats.prompt_tokens
    assert usage.completion_tokens == expected.stats.new_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.visual_tokens == 16
    assert usage.kept_tokens == expected.prompt.visual_tokens_kept == len(expected.prompt.indices[0])
    (image,) = got.flashvlm["images"]
    assert image["kept_indices"] == expected.prompt.indices[0].tolist()
    assert image["grids"] == [[4, 4]]
    # Of 80 x 60 pixels the encoder sees a square of 60 in the middle.
    assert image["view"] == [pytest.approx(edge, abs=0.01) for edge in (1 / 8, 0, 7 / 8, 1)]
    assert set(got.flashvlm["stage_ms"]) >= {"queue", "tokenize", "select", "prefill", "decode"}


def test_a_stream_says_the_same_piece_by_piece(client: Any) -> None:
    asked = [user(QUESTION, png(2), png(3))]
    whole = ask(client, asked, max_tokens=16, selection=True)
    chunks = list(
        ask(client, asked, max_tokens=16, selection=True, stream=True, stream_options={"include_usage": True})
    )
    first, *middle, last, usage = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert first.flashvlm["images"] == whole.flashvlm["images"], "what is kept is known before the answer"
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content
    assert len(middle) > 4
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *middle))
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert set(last.flashvlm["stage_ms"]) >= {"prefill", "decode"}
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert not any(chunk.usage for chunk in ask(client, asked, max_tokens=2, stream=True))


def test_a_conversation_is_the_pipelines_history(client: Any, vlm: Pipeline) -> None:
    said = "It is a cat."
    messages = [
        {"role": "system", "content": "Be brief."},
        user(QUESTION, png(4)),
        {"role": "assistant", "content": said},
        user("And here?", png(5)),
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}], "refusal": None},
        {"role": "user", "content": "Which is older?"},
    ]
    history = [Exchange([png(4)], QUESTION, said), Exchange([png(5)], "And here?", "A dog.")]
    request = Request([], "Which is older?", "Be brief.", history=history)
    expected = alone(vlm, request, Pruning(5), SamplingParams(12))
    got = ask(client, messages, token_budget=5, max_tokens=12)
    assert got.choices[0].message.content == expected.text
    assert (got.usage.visual_tokens, got.usage.kept_tokens) == (32, 10)
    assert got.usage.prompt_tokens == expected.stats.prompt_tokens
    assert "images" not in got.flashvlm, "nobody asked what is kept"


def test_neighbours_of_one_role_are_one_message(client: Any) -> None:
    """As front ends send them after an answer that failed."""
    system = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}]
    apart = [*system, user("Look.", png(4)), user("What is it?")]
    together = [{"role": "system", "content": "Be brief.\nBe kind."}, user("Look.\nWhat is it?", png(4))]
    answers = [ask(client, messages, max_tokens=12) for messages in (apart, together)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage
    back = {"role": "assistant", "content": None, "tool_calls": [], "annotations": [], "refusal": None}
    assert ask(client, [*apart, back, user("Why?")], max_tokens=4).usage.visual_tokens == 16


def test_images_are_encoded_once(client: Any) -> None:
    asked = user(QUESTION, png(6))
    first = ask(client, [asked], max_tokens=4)
    again = ask(client, [asked, {"role": "assistant", "content": "Noise."}, user("Why?")], max_tokens=4)
    assert "encode" in first.flashvlm["stage_ms"]
    assert "encode" not in again.flashvlm["stage_ms"]


def test_fields_that_clients_send_by_habit_are_taken(client: Any) -> None:
    habits = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": [], "logit_bias": {}}
    habits |= {"tool_choice": "auto", "service_tier": "auto", "response_format": {"type": "text"}, "user": "somebody"}
    plain = ask(client, [user(QUESTION, png(1))], max_tokens=8)
    got = ask(client, [user(QUESTION, png(1))], max_tokens=8, **habits)
    assert got.choices[0].message.content == plain.choices[0].message.content


def test_words_alone_are_answered(client: Any, vlm: Pipeline) -> None:
    got = ask(client, [{"role": "user", "content": "Who are you?"}], max_tokens=8)
    assert got.choices[0].message.content == alone(vlm, Request([], "Who are you?"), Pruning(), SamplingParams(8)).text
    assert (got.usage.visual_tokens, got.usage.kept_tokens) == (0, 0)


def test_stop_texts_end_an_answer(client: Any) -> None:
    whole = ask(client, [user(QUESTION, png(1))], max_tokens=20).choices[0].message.content
    middle = whole[len(whole) // 2 :][:2]
    for stop in (middle, ["never said", middle]):
        got = ask(client, [user(QUESTION, png(1))], max_tokens=20, stop=stop)
        assert got.choices[0].message.content == whole.partition(middle)[0]
        assert got.choices[0].finish_reason == "stop"


def test_many_clients_get_their_own_answers(client: Any, served: Process) -> None:
    def options(seed: int) -> dict[str, Any]:
        return {"token_budget": (3, 9, "full")[seed % 3], "max_tokens": 4 + seed % 7, "selection": True}

    def facts(got: Any) -> tuple[Any, ...]:
        return got.choices[0].message.content, got.usage, got.flashvlm["images"]

    expected = [facts(ask(client, [user(f"Question {seed}?", png(seed))], **options(seed))) for seed in range(16)]
    assert len({content for content, *_ in expected}) > 8, "dull answers would match anything"

    def one(seed: int) -> tuple[Any, ...]:
        return facts(ask(client, [user(f"Question {seed}?", png(seed))], **options(seed)))

    with ThreadPoolExecutor(16) as askers:
        assert list(askers.map(one, range(16))) == expected

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as other:
            return await asyncio.gather(
                *(ask(other, [user(f"Question {seed}?", png(seed))], **options(seed)) for seed in range(16))
            )

    assert [facts(got) for got in asyncio.run(ask_all())] == expected


def test_grids_are_told_as_rows_and_columns() -> None:
    kept = np.array([0, 7, 14])
    image = SelectedImage(np.zeros((3, 4), np.float32), kept, kept, np.zeros(15), ImageLayout(((3, 5),)))
    prompt = PrunedPrompt(np.zeros((3, 4)), np.arange(3), None, [image], {})  # type: ignore[arg-type]  # not looked at
    assert kept_tokens(prompt) == [KeptTokens([(3, 5)], [0, 7, 14])]


def test_models_are_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "flashvlm-export")
    assert model.flashvlm["visual_tokens"] == 16
    assert model.flashvlm["selectors"] == ["flashvlm", "divprune", "cdpruner"]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "status", "param", "code", "message"),
    [
        ({"model": "other"}, 404, "model", "model_not_found", "there is no model 'other' here, only 'tiny-llava'"),
        ({"token_budget": 17}, 400, "token_budget", "invalid_value", "received: 17; expected: 1 to 16"),
        ({"token_budget": 0}, 400, "token_budget", "invalid_value", "expected: 1 to 16"),
        ({"token_budget": "half"}, 400, "token_budget", None, "'full'"),
        ({"token_budget": True}, 400, "token_budget", None, "integer"),
        ({"selector": "other"}, 400, "selector", "invalid_value", "only flashvlm, divprune, cdpruner"),
        ({"positions": "left"}, 400, "positions", "literal_error", "'contiguous' or 'original'"),
        ({"max_tokens": 1025}, 400, "max_tokens", "invalid_value", "at most 1024 tokens here, not 1025"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater_than_equal", "greater than or equal to 1"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, 400, "max_tokens", None, "give one of them"),
        ({"max_tokens": 1020}, 400, "messages", "context_length_exceeded", "too long for the language model"),
        ({"temperature": 2.1}, 400, "temperature", "less_than_equal", "less than or equal to 2"),
        ({"top_p": 0}, 400, "top_p", "greater_than", "greater than 0"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", None, "at most 4 items"),
        ({"stop": ""}, 400, "stop", None, "at least 1 character"),
        ({"stop": "x" * 201}, 400, "stop", None, "at most 200 characters"),
        ({"n": 2}, 400, "n", "literal_error", "1"),
        ({"logprobs": True}, 400, "logprobs", "literal_error", "False"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter", "tools is not supported here"),
        ({"logit_bias": {"7": 1}}, 400, "logit_bias", "unsupported_parameter", "logit_bias is not supported here"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort", "unsupported_parameter", "is not supported here"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty", "less_than_equal", "0"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "literal_error", "text"),
        ({"metadata": dict.fromkeys("abcdefghijklmnopq", "x")}, 400, "metadata", "too_long", "at most 16 items"),
        ({"seed": -1}, 400, "seed", "greater_than_equal", "0"),
        ({"messages": []}, 400, "messages", "too_short", "at least 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages", "invalid_value", "received system"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "literal_error", "'user'"),
        (
            {"messages": [user("a"), {"role": "assistant", "content": "b"}]},
            400,
            "messages",
            "invalid_value",
            "user, assistant",
        ),
        ({"messages": [{}] * 257}, 400, "messages", "too_long", "at most 256 items"),
        (
            {"messages": [{"role": "system", "content": user("b", png(1))["content"]}, user("c")]},
            400,
            "messages",
            "invalid_value",
            "only the user shows images",
        ),
        ({"messages": [user("")]}, 400, None, "invalid_value", "empty"),
        ({"messages": [user("See <image>")]}, 400, None, "invalid_value", "placeholders"),
        ({"messages": [user("x" * 500_000)]}, 400, "messages", "context_length_exceeded", "500000 characters"),
        ({"messages": [user("why " * 4200)]}, 400, "messages", "context_length_exceeded", "tokens of text"),
        (
            {"messages": [user("?", *[png(1)] * 17)]},
            400,
            "messages",
            "too_many_images",
            "at most 16 images here, not 17",
        ),
        (
            {"messages": [user("a"), {"role": "assistant", "content": user("b", png(1))["content"]}, user("c")]},
            400,
            "messages",
            "invalid_value",
            "only the user shows images",
        ),
    ],
)
def test_mistakes_have_openais_shape(
    client: Any, options: dict[str, Any], status: int, param: str | None, code: str | None, message: str
) -> None:
    given = {"model": MODEL, "messages": [user(QUESTION, png(1))], **options}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=MODEL, messages=[], extra_body=given)
    error = caught.value
    assert error.status_code == status
    assert message in error.body["message"]
    assert "Traceback" not in error.response.text
    assert "--" not in error.body["message"], "options are for the command line"
    if param is not None:
        assert error.body["param"] == param
    if code is not None:
        assert error.body["code"] == code
    assert error.body["type"] == "invalid_request_error"
    # The same before a stream begins.
    with pytest.raises(openai.APIStatusError) as streamed:
        client.chat.completions.create(model=MODEL, messages=[], extra_body={**given, "stream": True})
    assert streamed.value.status_code == status


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/cat.png", "not fetched from this host"),
        ("file:///etc/passwd", "comes inside the request"),
        ("/etc/passwd", "comes inside the request"),
        ("ftp://example.com/cat.png", "comes inside the request"),
        ("data:text/plain;base64,aGVsbG8=", "holds no image"),
        ("data:image/png;base64,%%%", "holds no image"),
        (data_uri(b"hello"), "not an image that can be read"),
        (data_uri(png(1)[:-40]), "cannot be decoded completely"),
        (data_uri(b""), "empty"),
        ("http://[", "not the address of a picture"),
    ],
)
def test_pictures_that_are_none(client: Any, url: str, message: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, [{"role": "user", "content": parts}])
    assert (caught.value.body["param"], caught.value.body["code"]) == ("messages", "invalid_image")


def test_the_example_of_the_readme_works(served: Process, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "OpenAI(" in block]
    here = {"http://127.0.0.1:8000": served.url, "flashvlm-tiny": MODEL, "examples/": f"{root}/examples/", "128": "12"}
    for written, meant in here.items():
        assert written in code
        code = code.replace(written, meant)
    exec(code, {})
    assert "kept_tokens=12" in capsys.readouterr().out
