"""Conversations: what was said comes first, images stay as they were or are chosen anew, nothing is done twice."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.cli import main
from flashvlm_export.errors import LLMError, UsageError
from flashvlm_export.runtime.chat import Chat
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Exchange, Pruning, Request

PARAMS = SamplingParams(max_new_tokens=6)


@pytest.fixture
def vlm(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, precision="fp32", selectors=[]) as opened:
        yield opened


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


def test_a_conversation_is_one_prompt(vlm: Pipeline) -> None:
    chat = Chat(vlm, Pruning(5, "question"))
    first = chat.ask("What is it?", [picture(0)], params=PARAMS)
    second = chat.ask("And this one?", [picture(1)], params=PARAMS)
    third = chat.ask("Which is older?", params=PARAMS)
    text = third.prompt.prompt.text
    parts = ["What is it?", first.text.strip(), "And this one?", second.text.strip(), "Which is older?"]
    places = [text.index(part) for part in parts if part]
    assert places == sorted(places)
    assert len(third.prompt.images) == 2
    # Kept as the questions chose them with which they came, and put where they stood.
    assert third.prompt.images[0] is first.prompt.images[0]
    assert third.prompt.images[1] is second.prompt.images[1]
    for place, image in zip(third.prompt.prompt.image_positions, third.prompt.images, strict=True):
        start = place + (5 - 1 if image is third.prompt.images[1] else 0)
        np.testing.assert_array_equal(third.prompt.inputs_embeds[start : start + 5], image.tokens)
    assert "select" not in third.prompt.stage_ms
    assert "encode" not in third.prompt.stage_ms


def test_what_is_known_is_not_computed_again(vlm: Pipeline) -> None:
    """Each answer is that of a pipeline that has never heard the conversation."""
    for reselect in (False, True):
        chat = Chat(vlm, Pruning(5, "question"), reselect=reselect)
        previous = chat.ask("What is it?", [picture(0)], params=PARAMS)
        for question in ("Is there a cat?", "What does it do?"):
            exchanges = list(chat.exchanges)
            answer = chat.ask(question, params=PARAMS)
            # Up to the image, or, where it stays as it was, up to the answer.
            start = previous.prompt.prompt.image_positions[0]
            least = start if reselect else previous.stats.prompt_tokens
            assert least <= answer.stats.reused_tokens < answer.stats.prompt_tokens
            again = vlm.encode([Request([], question, history=exchanges)], budget=5, text_span="question")[0]
            np.testing.assert_array_equal(again.inputs_embeds, answer.prompt.inputs_embeds)
            alone = vlm.answer(again, PARAMS)
            assert alone.token_ids == answer.token_ids
            assert alone.stats.reused_tokens == 0
            with vlm.reusing_prefixes():  # as if the other had not been asked
                vlm.answer(previous.prompt, PARAMS)
                vlm.answer(answer.prompt, PARAMS)
            previous = answer


def test_images_are_chosen_anew_where_that_is_asked_for(vlm: Pipeline) -> None:
    kept = {}
    for reselect in (False, True):
        chat = Chat(vlm, Pruning(5, "question"), reselect=reselect)
        chat.ask("What is it?", [picture(0)], params=PARAMS)
        answer = chat.ask("How many stripes has the zebra on the left?", params=PARAMS)
        kept[reselect] = answer.prompt.indices[0].tolist()
        assert ("select" in answer.prompt.stage_ms) == reselect
        assert "encode" not in answer.prompt.stage_ms, "the image was known"
    request = Request([picture(0)], "How many stripes has the zebra on the left?")
    assert kept[True] == vlm.encode([request], budget=5, text_span="question")[0].indices[0].tolist()
    assert kept[True] != kept[False]


def test_a_question_that_fails_leaves_the_conversation(vlm: Pipeline) -> None:
    chat = Chat(vlm, Pruning(5))
    chat.ask("What is it?", [picture(0)], params=PARAMS)
    before = list(chat.exchanges)
    with pytest.raises(LLMError, match="too long"):
        chat.ask("And now?", [picture(1)], params=SamplingParams(max_new_tokens=1020))
    assert chat.exchanges == before
    assert chat.ask("And now?", params=PARAMS).stats.reused_tokens > 0


def test_history_and_raw_prompts_exclude_each_other(vlm: Pipeline) -> None:
    history = [Exchange([picture(0)], "What is it?", "A cat.")]
    with pytest.raises(UsageError, match="raw prompt has history and system text inside"):
        vlm.encode([Request([], "USER: and now?", raw=True, history=history)])
    with pytest.raises(UsageError, match="raw prompt has history and system text inside"):
        vlm.encode([Request([picture(0)], "USER: <image> and now?", system="Be brief.", raw=True)])


def test_the_command(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    image = ["--image", str(tmp_path / "0.png")]
    command = ["chat", str(tiny_bundle), "--budget", "5", "--max-tokens", "6", "--json"]
    prompts = ["--prompt", "What is it?", "--prompt", "And now?"]
    assert main([*command, *image, *prompts]) == 0
    by_option = json.loads(capsys.readouterr().out)["answers"]
    lines = f"What is it?\n\nAnd now?\n/image {tmp_path / '1.png'}\nAnd that?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main([*command, *image]) == 0
    by_line = json.loads(capsys.readouterr().out)["answers"]
    for row, other in zip(by_line, by_option, strict=False):
        assert all(row[name] == other[name] for name in ("prompt", "answer", "kept_indices", "reused_tokens"))
    assert by_option[0]["reused_tokens"] == 0 < by_option[1]["reused_tokens"]
    assert [len(row["kept_indices"]) for row in by_line] == [1, 1, 2]

    assert main([*command, *image, *prompts, "--reselect"]) == 0
    anew = json.loads(capsys.readouterr().out)["answers"]
    assert "visual" in anew[1]["stage_ms"]
    assert "visual" not in by_option[1]["stage_ms"]


class Terminal(io.StringIO):
    """Lines that somebody types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "message"),
    [("/image nothing.png", "there is no image file"), ("/image", "lacks a file"), ("/quit", "/video FILE, or a")],
)
def test_a_line_that_fails_ends_a_script_and_not_a_person(
    line: str,
    message: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    command = ["chat", str(tiny_bundle), "--image", str(tmp_path / "0.png"), "--max-tokens", "3", "--json"]
    lines = f"What is it?\n{line}\nAnd now?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(command) != 0
    captured = capsys.readouterr()
    assert message in captured.err
    assert [row["prompt"] for row in json.loads(captured.out)["answers"]] == ["What is it?"], "an answer was lost"
    monkeypatch.setattr("sys.stdin", Terminal(lines))
    assert main(command) == 0
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Ctrl-D" in captured.err
    assert [row["prompt"] for row in json.loads(captured.out)["answers"]] == ["What is it?", "And now?"]
    monkeypatch.setattr("sys.stdin", Terminal(lines))
    assert main([*command, "--budget", "99"]) == 2, "what no line can mend"
    assert "99" in capsys.readouterr().err


def test_a_question_that_fails_takes_its_pictures_along(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise one that is too long would make all later ones so."""
    for number in range(2):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    command = ["chat", str(tiny_bundle), "--image", str(tmp_path / "0.png"), "--max-tokens", "3", "--json"]
    lines = f"What is it?\n/image {tmp_path / '1.png'}\n/image nothing.png\nAnd this <image>?\nAnd now?\n"
    monkeypatch.setattr("sys.stdin", Terminal(lines))
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err.count("shows one again") == 1
    answers = json.loads(captured.out)["answers"]
    assert [(row["prompt"], len(row["kept_indices"])) for row in answers] == [("What is it?", 1), ("And now?", 1)]


def test_pictures_are_looked_at_before_anything_is_asked(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tiny_bundle), "--image", "nothing.png", "--prompt", "What is it?"]) == 1
    captured = capsys.readouterr()
    assert "there is no image file" in captured.err
    assert "What is it?" not in captured.out
