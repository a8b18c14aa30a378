"""Selectors side by side: figures by hand, paired intervals, and one unpruned answer for all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluating import CountingModel

from flashvlm_export.evaluation.compare import Comparison, compare, comparison_table
from flashvlm_export.evaluation.dataset import Question, read_dataset
from flashvlm_export.evaluation.evaluate import answer_missing, question_keys
from flashvlm_export.evaluation.journal import AnswerLine, Journal, RunSettings, read_answers
from flashvlm_export.evaluation.metrics import METRICS
from flashvlm_export.evaluation.plot import draw_selectors
from flashvlm_export.evaluation.results import DataSetEntry, bootstrap_settings
from flashvlm_export.progress import Progress

SETTINGS = RunSettings("model", "0" * 64, "fp32", "onnxruntime CPUExecutionProvider", 16, "prompt", selector="a")


def comparison(right: dict[str, dict[int, list[bool]]]) -> Comparison:
    """Compare selectors of which it is known which questions they get right: half of kind one, half of kind two."""
    count = len(next(iter(next(iter(right.values())).values())))
    kinds = ["one" if number < count // 2 else "two" for number in range(count)]
    questions = [Question("", Path("x"), "?", ("x",), kind, METRICS["exact"], (), None) for kind in kinds]
    keys = [str(number) for number in range(count)]
    answers = {
        name: {
            (key, budget): AnswerLine(key, budget, key, "x" if hit else "-", 1, "stop")
            for budget, hits in budgets.items()
            for key, hit in zip(keys, hits, strict=True)
        }
        for name, budgets in right.items()
    }
    budgets = list(next(iter(right.values())))
    figures = compare(questions, keys, budgets, answers, visual_tokens=576, seed=0)
    data = DataSetEntry("data.jsonl", "1" * 64, count)
    return Comparison(
        1, "models/tiny", "fp32", data, 576, figures, dict.fromkeys(answers, SETTINGS), bootstrap_settings(0)
    )


def test_figures_by_hand() -> None:
    """Kind one: 10 questions, 8 right unpruned; kind two: 10, 10 right unpruned."""
    full = [n < 8 for n in range(10)] + [True] * 10
    first = [n < 6 for n in range(10)] + [n < 9 for n in range(10)]
    other = [n < 4 for n in range(10)] + [n < 9 for n in range(10)]
    rows = comparison({"a": {576: full, 64: first}, "b": {576: full, 64: other}}).selectors
    assert [(row.selector, row.budget) for row in rows] == [("a", 576), ("a", 64), ("b", 576), ("b", 64)]
    assert [row.mean.value for row in rows] == pytest.approx([0.9, 0.75, 0.9, 0.65])
    relative = [row.relative.value for row in rows if row.relative is not None]
    assert relative == pytest.approx([1.0, (6 / 8 + 0.9) / 2, 1.0, (4 / 8 + 0.9) / 2])
    assert [row.ahead.value for row in rows] == pytest.approx([0, 0, 0, -0.1])
    assert rows[3].kinds["one"].value == 0.4


def test_the_difference_is_paired() -> None:
    """``b`` loses one question of twenty that ``a`` has: never ahead in any draw, however much each one varies."""
    first = [n % 2 == 0 for n in range(400)]
    other = [hit and n % 20 != 0 for n, hit in enumerate(first)]
    a, b = comparison({"a": {64: first}, "b": {64: other}}).selectors
    assert a.relative is None  # nothing was run without pruning
    assert b.ahead.value == pytest.approx(-0.05)
    assert b.ahead.low is not None
    assert b.ahead.high is not None
    assert a.mean.low is not None
    assert a.mean.high is not None
    assert -0.08 < b.ahead.low < b.ahead.high < -0.02
    assert a.mean.high - a.mean.low > 0.09


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture")
    full, half = [True] * 8, [True, False] * 4
    found = comparison({"flashvlm": {576: full, 64: half}, "random": {576: full, 64: [False] * 8}})
    lines = [re.split(r"  +", row) for row in comparison_table(found)]
    assert lines[0] == ["selector", "budget", "mean", "relative to 576", "ahead of flashvlm"]
    assert lines[2][:2] == ["flashvlm", "64"]
    assert lines[2][3].startswith("0.500")
    assert len(lines[2]) == 4  # the first is not compared with itself
    assert lines[4][4].startswith("-0.500")
    draw_selectors(found, tmp_path / "selectors.svg")
    text = (tmp_path / "selectors.svg").read_text(encoding="utf-8")
    assert all(
        word in text for word in ("flashvlm", "random", "score relative to no pruning", "tiny, fp32, 8 questions")
    )


def test_other_positions_are_dashed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture")
    rights = {name: {576: [True] * 8, 64: [True, False] * 4} for name in ("flashvlm-original", "flashvlm")}
    found = comparison(rights)
    dashes = []
    for positions in ("contiguous", "original"):
        settings = {"flashvlm-original": replace(SETTINGS, positions=positions), "flashvlm": SETTINGS}
        draw_selectors(replace(found, settings=settings), tmp_path / "selectors.svg")
        dashes.append((tmp_path / "selectors.svg").read_text(encoding="utf-8").count("stroke-dasharray"))
    assert dashes[1] > dashes[0]


def test_the_unpruned_answer_is_asked_once_for_all_selectors(
    write_data: Callable[..., Path], questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = CountingModel(lambda image, question, budget: f"{image.name} {question} {budget}")
    data = read_dataset(write_data(*questions))
    keys = question_keys(data.questions, Progress())

    def run(names: list[str], budgets: list[int]) -> dict[str, int]:
        with ExitStack() as stack:
            journals = {name: stack.enter_context(Journal(tmp_path / name, SETTINGS)) for name in names}
            answer_missing(data.questions, keys, budgets, journals, model(), Progress(), visual_tokens=16)
            return {name: len(journal.answers) for name, journal in journals.items()}

    assert run(["a", "b"], [16, 4]) == {"a": 16, "b": 16}
    assert sorted(budget for _, _, budget in model.asked) == [4] * 16 + [16] * 8
    assert [selector for selector, _ in model.selectors[:3]] == ["a", "a", "b"]
    model.asked.clear()
    assert run(["a", "c"], [16, 4]) == {"a": 16, "c": 16}
    assert sorted(budget for _, _, budget in model.asked) == [4] * 8
    _, b = read_answers(tmp_path / "b")
    _, c = read_answers(tmp_path / "c")
    assert b == c


def test_recorded_answers_are_read_without_touching_them(tmp_path: Path) -> None:
    with Journal(tmp_path / "a", SETTINGS) as journal:
        journal.add(AnswerLine("k", 4, "1", "cat", 1, "stop"))
    file = tmp_path / "a" / "answers.jsonl"
    file.write_bytes(file.read_bytes() + b'{"half": ')
    before = file.read_bytes()
    settings, answers = read_answers(tmp_path / "a")
    assert (settings, answers["k", 4].text) == (SETTINGS, "cat")
    assert file.read_bytes() == before
    assert json.loads(before.splitlines()[0])["settings"]["selector"] == "a"
