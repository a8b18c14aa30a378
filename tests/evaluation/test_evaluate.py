"""The runner and its journal: every question asked once, whatever happens in between."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluating import CountingModel, line

from flashvlm_export.errors import BudgetError, EvaluationError, ImageError, JournalError, StorageError
from flashvlm_export.evaluation.dataset import read_dataset
from flashvlm_export.evaluation.evaluate import answer_missing, parse_budgets, question_keys
from flashvlm_export.evaluation.journal import JOURNAL, AnswerLine, Journal, RunSettings
from flashvlm_export.progress import Progress

SETTINGS = RunSettings("model", "0" * 64, "fp32", "onnxruntime CPUExecutionProvider", 16, "prompt")


def evaluate(
    data: Path, output: Path, budgets: list[int], model: CountingModel, settings: RunSettings = SETTINGS
) -> dict[tuple[str, int], AnswerLine]:
    """Run once, as the command does, and return all answers of the journal."""
    questions = read_dataset(data).questions
    progress = Progress()
    with Journal(output, settings) as journal:
        keys = question_keys(questions, progress)
        answer_missing(questions, keys, budgets, {"one": journal}, model(), progress, visual_tokens=16)
        return dict(journal.answers)


@pytest.fixture
def model() -> CountingModel:
    return CountingModel(lambda image, question, budget: f"{image.name} {question} {budget}")


@pytest.fixture
def data(write_data: Callable[..., Path], questions: list[dict[str, Any]]) -> Path:
    return write_data(*questions)


def test_each_question_is_asked_once_per_budget(data: Path, model: CountingModel, tmp_path: Path) -> None:
    answers = evaluate(data, tmp_path / "out", [16, 4], model)
    assert len(model.asked) == len(set(model.asked)) == len(answers) == 16
    assert [budget for _, _, budget in model.asked] == [16, 4] * 8  # question by question
    assert {answer.text for answer in answers.values()} == {" ".join(map(str, asked)) for asked in model.asked}


def test_another_list_of_budgets_asks_only_what_is_new(data: Path, model: CountingModel, tmp_path: Path) -> None:
    evaluate(data, tmp_path / "out", [16, 4], model)
    model.asked.clear()
    answers = evaluate(data, tmp_path / "out", [4, 2], model)
    assert {budget for _, _, budget in model.asked} == {2}
    assert len(model.asked) == 8
    assert {budget for _, budget in answers} == {16, 4, 2}  # nothing is lost
    model.asked.clear()
    evaluate(data, tmp_path / "out", [16], model)
    assert model.asked == []
    assert model.opened == 2  # where nothing is missing, the model is not even loaded


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_a_line_cut_off_by_a_kill_is_asked_again(cut: int, data: Path, model: CountingModel, tmp_path: Path) -> None:
    before = evaluate(data, tmp_path / "out", [16], model)
    journal = tmp_path / "out" / JOURNAL
    content = journal.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    journal.write_bytes(content[: max(len(content) - cut, last + 1)])
    model.asked.clear()
    assert evaluate(data, tmp_path / "out", [16], model) == before
    assert len(model.asked) == 1
    assert journal.read_bytes() == content


def test_killed_at_any_byte_the_journal_goes_on(data: Path, model: CountingModel, tmp_path: Path) -> None:
    whole = evaluate(data, tmp_path / "out", [16], model)
    journal = tmp_path / "out" / JOURNAL
    content = journal.read_bytes()
    for end in range(0, len(content), 97):
        journal.write_bytes(content[:end])
        model.asked.clear()
        assert evaluate(data, tmp_path / "out", [16], model) == whole
        assert len(model.asked) == 8 - max(content[:end].count(b"\n") - 1, 0)


def _kill_at_the_fifth(data: Path, output: Path) -> None:
    def rule(image: Path, question: str, budget: int) -> str:
        if len(dying.asked) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return "said before"

    dying = CountingModel(rule)
    evaluate(data, output, [16], dying)


def test_a_killed_process_loses_only_the_answer_it_was_at(data: Path, model: CountingModel, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_kill_at_the_fifth, args=(data, tmp_path / "out"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    answers = evaluate(data, tmp_path / "out", [16], model)
    assert [answer.text for answer in answers.values()].count("said before") == 4
    assert len(model.asked) == 4


def test_an_interrupt_keeps_what_is_done(data: Path, model: CountingModel, tmp_path: Path) -> None:
    stopped = CountingModel(lambda *asked: KeyboardInterrupt() if len(stopped.asked) == 6 else "x")
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, tmp_path / "out", [16], stopped)
    evaluate(data, tmp_path / "out", [16], model)
    assert len(model.asked) == 3


def test_a_damaged_line_in_the_middle_is_asked_again(data: Path, model: CountingModel, tmp_path: Path) -> None:
    before = evaluate(data, tmp_path / "out", [16], model)
    journal = tmp_path / "out" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = b"\x00" * 40 + b"\n"
    journal.write_bytes(b"".join(lines))
    model.asked.clear()
    with Journal(tmp_path / "out", SETTINGS) as opened:
        assert opened.damaged == 1
    assert evaluate(data, tmp_path / "out", [16], model) == before
    assert len(model.asked) == 1


def test_what_the_model_sees_decides_what_is_asked_anew(
    write_data: Callable[..., Path], model: CountingModel, tmp_path: Path
) -> None:
    first, second = line(id="1"), line(id="2", image="images/1.png")
    evaluate(write_data(first, second), tmp_path / "out", [16], model)
    model.asked.clear()
    # Other ids, answers and kinds, and a copy of an image under another name, are the same to the model.
    (tmp_path / "images/copy.png").write_bytes((tmp_path / "images/0.png").read_bytes())
    same = [first | {"id": "9", "answers": ["dog"], "kind": "x"}, line(id="8", image="images/copy.png")]
    evaluate(write_data(*same, second), tmp_path / "out", [16], model)
    assert model.asked == []
    evaluate(write_data(first | {"question": "What else?"}, second), tmp_path / "out", [16], model)
    assert model.asked == [("0.png", "What else?", 16)]
    model.asked.clear()
    (tmp_path / "images/1.png").write_bytes((tmp_path / "images/2.png").read_bytes())
    evaluate(write_data(first, second), tmp_path / "out", [16], model)
    assert model.asked == [("1.png", "What is it?", 16)]


@pytest.mark.parametrize(
    "changed",
    [
        {"bundle_sha256": "f" * 64},
        {"precision": "int8"},
        {"backend": "tensorrt orin"},
        {"max_new_tokens": 8},
        {"text_span": "question"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_answers_given_under_other_settings_are_not_mixed(
    changed: dict[str, Any], data: Path, model: CountingModel, tmp_path: Path
) -> None:
    before = evaluate(data, tmp_path / "out", [16], model)
    content = (tmp_path / "out" / JOURNAL).read_bytes()
    other = replace(SETTINGS, **changed)
    ((name, value),) = changed.items()
    with pytest.raises(JournalError, match="other settings") as caught:
        evaluate(data, tmp_path / "out", [16], model, other)
    assert caught.value.received == f"{name} {value}"
    assert "--output" in str(caught.value)
    assert (tmp_path / "out" / JOURNAL).read_bytes() == content
    evaluate(data, tmp_path / "other", [16], model, other)
    assert evaluate(data, tmp_path / "out", [16], model) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json\n", "first line"),
        ('{"schema_version": 1}\n', "first line"),
        ('{"schema_version": 2, "settings": 5}\n', "newer flashvlm-export"),
    ],
)
def test_a_journal_of_unknown_origin_is_left_alone(
    content: str, message: str, data: Path, model: CountingModel, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text(content)
    with pytest.raises(JournalError, match=message):
        evaluate(data, tmp_path / "out", [16], model)
    assert (tmp_path / "out" / JOURNAL).read_text() == content
    assert model.asked == []


def test_two_evaluations_do_not_write_into_one_directory(data: Path, model: CountingModel, tmp_path: Path) -> None:
    with Journal(tmp_path / "out", SETTINGS), pytest.raises(JournalError, match="another evaluation"):
        evaluate(data, tmp_path / "out", [16], model)
    evaluate(data, tmp_path / "out", [16], model)


def test_a_full_disk_loses_no_answer(small_disk: Path, data: Path, tmp_path: Path) -> None:
    long = CountingModel(lambda image, question, budget: "word " * 12_000)
    with pytest.raises(StorageError, match="disk is full"):
        evaluate(data, small_disk / "out", [16], long)
    kept = (small_disk / "out" / JOURNAL).read_bytes()
    assert kept.endswith(b"\n")
    assert len(long.asked) == kept.count(b"\n")  # the header, and all answers but the last
    with Journal(small_disk / "out", SETTINGS) as journal:
        assert len(journal.answers) == len(long.asked) - 1
        assert journal.damaged == 0


def test_questions_that_fail_are_named_and_the_others_answered(data: Path, tmp_path: Path) -> None:
    def rule(image: Path, question: str, budget: int) -> str | BaseException:
        return ImageError("the image cannot be decoded completely", received=image) if image.name == "1.png" else "yes"

    with pytest.raises(EvaluationError, match=r"2 question\(s\) could not be answered") as caught:
        evaluate(data, tmp_path / "out", [16], CountingModel(rule))
    assert "1 at budget 16: the image cannot be decoded completely" in str(caught.value)
    assert "p1 at budget 16" in str(caught.value)
    assert "6 answers are kept" in str(caught.value)
    whole = CountingModel(lambda *asked: "yes")
    evaluate(data, tmp_path / "out", [16], whole)
    assert len(whole.asked) == 2


def test_when_everything_fails_it_stops(write_data: Callable[..., Path], tmp_path: Path) -> None:
    data = write_data(*(line(id=number, question=f"Is it {number}?") for number in range(60)))
    broken = CountingModel(lambda image, question, budget: ImageError("no", received=image))
    with pytest.raises(EvaluationError, match=r"20 question\(s\) could not be answered, so the evaluation stopped"):
        evaluate(data, tmp_path / "out", [16], broken)
    assert len(broken.asked) == 20


def test_an_output_that_cannot_be_written(data: Path, model: CountingModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        evaluate(data, tmp_path / "file", [16], model)


def test_the_journal_can_be_read_by_people(data: Path, model: CountingModel, tmp_path: Path) -> None:
    evaluate(data, tmp_path / "out", [16], model)
    header, first, *_ = map(json.loads, (tmp_path / "out" / JOURNAL).read_text().splitlines())
    assert header["settings"]["precision"] == "fp32"
    assert (first["id"], first["budget"], first["text"]) == ("0", 16, "0.png What is it? 16")


def test_budgets() -> None:
    assert parse_budgets(None, 576) == [576, 192, 128, 64]
    assert parse_budgets(None, 16) == [16, 5, 3, 1]
    assert parse_budgets(None, 2) == [2, 1]
    assert parse_budgets("32, full,128,32", 576) == [576, 128, 32]
    for text, message in (
        ("0", "out of range"),
        ("577", "out of range"),
        ("12,x", "not a list"),
        ("", "not a list"),
        ("1.5", "not a list"),
    ):
        with pytest.raises(BudgetError, match=message):
            parse_budgets(text, 576)
