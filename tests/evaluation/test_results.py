"""From answers to figures: values by hand, intervals paired and by group, the table and the plot."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from flashvlm_export.errors import DependencyError
from flashvlm_export.evaluation.dataset import Question
from flashvlm_export.evaluation.journal import AnswerLine, RunSettings
from flashvlm_export.evaluation.metrics import METRICS
from flashvlm_export.evaluation.plot import draw_accuracy
from flashvlm_export.evaluation.results import DataSetEntry, Results, bootstrap_settings, summarise, table

Asked = tuple[Question, dict[int, str]]


def asked(kind: str, metric: str, answer: str, said: dict[int, str], group: str | None = None) -> Asked:
    return Question("", Path("x"), "?", (answer,), kind, METRICS[metric], (), group), said


def results_of(*items: Asked, visual_tokens: int = 576, seed: int = 0) -> Results:
    """Figures of questions with what was said to them at each budget."""
    questions = [question for question, _ in items]
    keys = [str(number) for number in range(len(items))]
    budgets = sorted(items[0][1], reverse=True)
    answers = {
        (key, budget): AnswerLine(key, budget, key, text, 1, "length" if text == "cut" else "stop")
        for key, (_, said) in zip(keys, items, strict=True)
        for budget, text in said.items()
    }
    kinds, overall = summarise(questions, keys, budgets, answers, visual_tokens=visual_tokens, seed=seed)
    settings = RunSettings("tiny", "0" * 64, "fp16", "onnxruntime", 8, "prompt")
    data = DataSetEntry("data.jsonl", "1" * 64, len(questions))
    return Results(1, settings, data, visual_tokens, kinds, overall, bootstrap_settings(seed))


def test_values_and_ratios_by_hand() -> None:
    """Of ten exact questions 8 are right with 576 tokens and 6 with 64; of 40 POPE ones 40, and 30 (ten no missed)."""
    exact = [asked("a", "exact", "x", {576: "x" if n < 8 else "-", 64: "x" if n < 6 else "-"}) for n in range(10)]
    pope = [asked("p", "pope", "yes", {576: "yes", 64: "yes"}) for _ in range(20)]
    pope += [asked("p", "pope", "no", {576: "no", 64: said}) for said in ("no", "yes") * 10]
    results = results_of(*exact, *pope)
    first, second = results.kinds
    assert [f.figures["accuracy"].value for f in first.budgets] == [0.8, 0.6]
    assert second.headline == "f1"
    assert [f.figures["f1"].value for f in second.budgets] == pytest.approx([1.0, 0.8])  # 2*2 / (2*2 + 1 + 0)
    assert [f.figures["yes_ratio"].value for f in second.budgets] == [0.5, 0.75]
    full, pruned = results.overall
    assert (full.figures["mean"].value, pruned.figures["mean"].value) == pytest.approx((0.9, 0.7))
    assert full.relative is not None
    assert (full.relative.value, full.relative.low, full.relative.high) == (1.0, 1.0, 1.0)
    assert pruned.relative is not None
    assert pruned.relative.value == pytest.approx((0.75 + 0.8) / 2)


def test_without_the_unpruned_budget_nothing_is_relative() -> None:
    results = results_of(*(asked("a", "exact", "x", {64: "x"}) for _ in range(3)))
    assert results.kinds[0].budgets[0].relative is None
    assert results.overall[0].relative is None


def test_the_interval_of_an_accuracy_is_that_of_a_binomial() -> None:
    results = results_of(*(asked("a", "exact", "x", {576: "x" if n < 640 else "-"}) for n in range(800)))
    estimate = results.kinds[0].budgets[0].figures["accuracy"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 800)
    assert estimate.low == pytest.approx(0.8 - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(0.8 + half, abs=0.1 * half)


def test_ratios_are_paired() -> None:
    """Pruning loses a tenth of 1000 right answers out of 2000: of those that were right, a binomial share stays.

    Its standard error is sqrt(0.9 * 0.1 / 1000), a third of what two independent samples would give.
    """
    said = [{576: "x" if n < 1000 else "-", 64: "x" if n < 900 else "-"} for n in range(2000)]
    relative = results_of(*(asked("a", "exact", "x", texts) for texts in said)).kinds[0].budgets[1].relative
    assert relative is not None
    half = 1.96 * np.sqrt(0.9 * 0.1 / 1000)
    assert relative.value == pytest.approx(0.9)
    assert relative.low == pytest.approx(0.9 - half, abs=0.1 * half)
    assert relative.high == pytest.approx(0.9 + half, abs=0.1 * half)


def test_f1_and_its_ratio_against_scipy() -> None:
    """SciPy draws the same questions for both budgets, too, and computes the figures from the answers themselves."""
    stats = pytest.importorskip("scipy.stats", reason="an independent bootstrap")
    random = np.random.default_rng(5)
    there = random.random(300) < 0.5
    said = {576: there ^ (random.random(300) < 0.15), 64: there ^ (random.random(300) < 0.25)}
    words = {budget: np.where(yes, "yes", "no") for budget, yes in said.items()}
    items = [
        asked("p", "pope", "yes" if there[n] else "no", {budget: str(words[budget][n]) for budget in words})
        for n in range(300)
    ]

    def f1(said_yes: np.ndarray, is_yes: np.ndarray, axis: int) -> np.ndarray:
        hits = (said_yes & is_yes).sum(axis=axis)
        return 2 * hits / (said_yes.sum(axis=axis) + is_yes.sum(axis=axis))

    def ratio(pruned: np.ndarray, full: np.ndarray, is_yes: np.ndarray, axis: int) -> np.ndarray:
        return f1(pruned, is_yes, axis) / f1(full, is_yes, axis)

    options = {"paired": True, "vectorized": True, "n_resamples": 4000, "method": "percentile", "rng": random}
    expected = stats.bootstrap((said[64], there), f1, **options).confidence_interval
    expected_ratio = stats.bootstrap((said[64], said[576], there), ratio, **options).confidence_interval
    pruned = results_of(*items).kinds[0].budgets[1]
    assert pruned.relative is not None
    for found, (low, high) in ((pruned.figures["f1"], expected), (pruned.relative, expected_ratio)):
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))


def test_groups_are_drawn_and_counted_whole() -> None:
    """100 images with two questions each, both right or both wrong: as uncertain as 100 questions, not as 200."""
    said = [("Yes" if n < 60 else "No") for n in range(100)]
    apart = [asked("m", "yes_no", "Yes", {576: text}) for text in said for _ in range(2)]
    paired = [asked("m", "yes_no", "Yes", {576: text}, str(n)) for n, text in enumerate(said) for _ in range(2)]
    wide, narrow = results_of(*paired).kinds[0], results_of(*apart).kinds[0]
    assert (wide.questions, wide.clusters, narrow.clusters) == (200, 100, 200)
    widths = [(f.high or 0) - (f.low or 0) for f in (k.budgets[0].figures["accuracy"] for k in (wide, narrow))]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(2), rel=0.12)
    assert "group_accuracy" not in narrow.budgets[0].figures
    assert wide.budgets[0].figures["group_accuracy"].value == 0.6


def test_half_a_group_does_not_count_as_a_group() -> None:
    """MME: accuracy 3 of 4, accuracy+ 1 of 2."""
    items = [
        asked("m", "yes_no", "Yes", {576: text}, group)
        for text, group in (("Yes", "1"), ("Yes", "1"), ("Yes", "2"), ("No", "2"))
    ]
    figures = results_of(*items).kinds[0].budgets[0].figures
    assert (figures["accuracy"].value, figures["group_accuracy"].value) == (0.75, 0.5)


def test_what_is_not_defined_stays_empty() -> None:
    """Nothing right without pruning: no ratio. No yes at all: no precision."""
    results = results_of(
        *(asked("a", "exact", "x", {576: "-", 64: "x"}) for _ in range(5)),
        *(asked("p", "pope", "no", {576: "no", 64: "no"}) for _ in range(5)),
    )
    relative = results.kinds[0].budgets[1].relative
    assert relative is not None
    assert (relative.value, relative.low) == (None, None)
    assert results.kinds[1].budgets[0].figures["precision"].value is None
    assert " - " in " \n".join(table(results))


def test_the_table_and_answers_cut_off() -> None:
    results = results_of(
        *(asked("dogs", "exact", "x", {576: "x", 64: "cut"}) for _ in range(2)),
        *(asked("cats", "exact", "x", {576: "x", 64: "x"}) for _ in range(2)),
    )
    assert [f.cut_off for f in results.overall] == [0, 2]
    lines = [re.split(r"  +", row) for row in table(results)]
    assert lines[0] == ["kind", "figure", "questions", "budget", "value", "relative to 576"]
    assert lines[1] == ["dogs", "accuracy", "2", "576", "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]"]
    assert lines[2][3:] == ["64", "0.000 [0.000, 0.000]", "0.000 [0.000, 0.000]"]
    assert [row[:4] for row in lines[-2:]] == [["all kinds", "mean", "4", "576"], ["all kinds", "mean", "4", "64"]]
    assert lines[-1][4].startswith("0.500")


def test_a_kind_has_the_same_interval_beside_any_other() -> None:
    one = [asked("a", "exact", "x", {576: "x" if n % 3 else "-"}) for n in range(60)]
    other = [asked("b", "exact", "x", {576: "x"}) for _ in range(5)]
    assert results_of(*one).kinds[0] == results_of(*other, *one).kinds[1]
    assert results_of(*one) == results_of(*one)
    assert results_of(*one) != results_of(*one, seed=1)


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    items = [asked(kind, "exact", "x", {576: "x", 64: "x" if n % 2 else "-"}) for kind in "ab" for n in range(10)]
    for name in ("one.svg", "two.svg"):
        draw_accuracy(results_of(*items), tmp_path / name)
    texts = [element.text for element in ET.parse(tmp_path / "one.svg").iter() if element.tag.endswith("}text")]
    assert {"64", "576", "a (accuracy)", "b (accuracy)", "all kinds (mean)", "visual tokens kept, of 576"} <= set(texts)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"\[report\]"):
        draw_accuracy(results_of(asked("a", "exact", "x", {576: "x"})), tmp_path / "plot.svg")
    assert not list(tmp_path.iterdir())
