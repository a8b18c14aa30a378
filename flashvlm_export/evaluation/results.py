"""Answers → figures with 95 % intervals: ``results.json``, and the same as a table."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashvlm_export.evaluation.bootstrap import LEVEL, REPEATS, interval, resampled_sums
from flashvlm_export.evaluation.dataset import Question
from flashvlm_export.evaluation.journal import AnswerLine, RunSettings
from flashvlm_export.evaluation.metrics import Metric
from flashvlm_export.specs import Array

SCHEMA_VERSION = 1
RESULTS = "results.json"

# Of the column that counts whole groups that are right, in a row after the metric's own numbers.
_GROUP_COLUMNS = 2


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds it with 95 %; ``None`` where it is not defined, such as 0 / 0."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class BudgetFigures:
    """How one kind, or all of them together, fares at one budget.

    Attributes:
        budget: visual tokens kept per image.
        figures: by name; with groups also ``group_accuracy``, the share of groups in which every question is right.
        relative: the headline figure over that without pruning, interval paired; ``None`` if that was not run.
        cut_off: answers that ended at the longest length allowed.
    """

    budget: int
    figures: dict[str, Estimate]
    relative: Estimate | None
    cut_off: int


@dataclass(frozen=True)
class KindResult:
    """One kind of question: its metric, and its figures by budget."""

    kind: str
    metric: str
    headline: str
    questions: int
    clusters: int
    budgets: list[BudgetFigures]


@dataclass(frozen=True)
class DataSetEntry:
    """Which questions: the file's name and hash, how many, and how they were drawn from it."""

    file: str
    sha256: str
    questions: int
    limit: int | None = None
    seed: int | None = None
    kinds: list[str] | None = None


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        schema_version: of this record.
        settings: what every answer depends on.
        dataset: which questions.
        visual_tokens: of one image without pruning.
        kinds: figures of each kind.
        overall: mean of the kinds' headline figures, and mean of their relative ones.
        bootstrap: how the intervals came about.
        tools: versions of this package and of Python.
    """

    schema_version: int
    settings: RunSettings
    dataset: DataSetEntry
    visual_tokens: int
    kinds: list[KindResult]
    overall: list[BudgetFigures]
    bootstrap: dict[str, float]
    tools: dict[str, str] = field(default_factory=dict)


def summarise(
    questions: Sequence[Question],
    keys: Sequence[str],
    budgets: Sequence[int],
    answers: Mapping[tuple[str, int], AnswerLine],
    *,
    visual_tokens: int,
    seed: int,
) -> tuple[list[KindResult], list[BudgetFigures]]:
    """Return the figures of each kind, and of all kinds together.

    Args:
        questions: all answered at all ``budgets``.
        keys: their hashes, by which ``answers`` has them.
        budgets: in the order of the result.
        answers: of the journal.
        visual_tokens: the budget that counts as no pruning.
        seed: of the bootstrap.
    """
    results: list[KindResult] = []
    headlines: list[_Draws] = []
    columns = [{key: answers[key, budget] for key in keys} for budget in budgets]
    unpruned = budgets.index(visual_tokens) if visual_tokens in budgets else None
    for kind, items in by_kind(questions, keys).items():
        result, headline = _kind(kind, items, budgets, columns, unpruned, seed)
        results.append(result)
        headlines.append(headline)
    return results, _overall(results, headlines, budgets)


Item = tuple[str, Question]
"""A question with its hash."""

Column = Mapping[str, AnswerLine]
"""One answer to each question, by its hash: those of one budget, say."""


def by_kind(questions: Sequence[Question], keys: Sequence[str]) -> dict[str, list[Item]]:
    """Return the questions of each kind, with their hashes."""
    kinds: dict[str, list[Item]] = {}
    for key, question in zip(keys, questions, strict=True):
        kinds.setdefault(question.kind, []).append((key, question))
    return kinds


def resampled_figures(kind: str, items: Sequence[Item], columns: Sequence[Column], seed: int) -> list[dict[str, Array]]:
    """Return for each column the figures of one kind: ``[1 + draws]``, first as measured.

    Every draw holds the same questions for all columns.
    """
    metric = items[0][1].metric
    grouped = any(question.group is not None for _, question in items)
    rows = _rows(items, columns, metric, grouped)
    draws = resampled_sums(rows.reshape(len(rows), -1), seed=seed ^ zlib.crc32(kind.encode()))
    sums = np.concatenate([rows.sum(axis=0).reshape(1, -1), draws]).reshape(len(draws) + 1, len(columns), -1)
    return [_figures(metric, sums[:, place], grouped) for place in range(len(columns))]


@dataclass(frozen=True)
class _Draws:
    """A kind's headline figure by budget, and relative to no pruning: first as measured, then in each draw."""

    values: list[Array]
    ratios: list[Array] | None


def _kind(
    kind: str,
    items: Sequence[Item],
    budgets: Sequence[int],
    columns: Sequence[Column],
    unpruned: int | None,
    seed: int,
) -> tuple[KindResult, _Draws]:
    metric = items[0][1].metric
    figures = resampled_figures(kind, items, columns, seed)
    values = [found[metric.headline] for found in figures]
    ratios = None
    if unpruned is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = [value / values[unpruned] for value in values]
    result = KindResult(
        kind,
        metric.name,
        metric.headline,
        len(items),
        len(_clusters(items)),
        [
            BudgetFigures(
                budget,
                {name: estimate(figure) for name, figure in figures[place].items()},
                estimate(ratios[place]) if ratios else None,
                sum(columns[place][key].finish_reason == "length" for key, _ in items),
            )
            for place, budget in enumerate(budgets)
        ],
    )
    return result, _Draws(values, ratios)


def _clusters(items: Sequence[Item]) -> list[list[Item]]:
    """Return the questions that are drawn together: groups, and single questions."""
    groups: dict[object, list[Item]] = {}
    for place, (key, question) in enumerate(items):
        groups.setdefault(place if question.group is None else question.group, []).append((key, question))
    return list(groups.values())


def _rows(items: Sequence[Item], columns: Sequence[Column], metric: Metric, grouped: bool) -> Array:
    """Return summed rows ``[clusters, columns, numbers]``.

    Numbers are the metric's own, then 1 where all questions of the cluster are right (if ``grouped``), then 1.
    """
    clusters = []
    for members in _clusters(items):
        by_column = []
        for column in columns:
            texts = [(column[key].text, question) for key, question in members]
            own = np.sum([metric.row(text, question) for text, question in texts], axis=0)
            right = grouped and all(metric.score(text, question) == 1 for text, question in texts)
            by_column.append([*own, float(right), 1.0])
        clusters.append(by_column)
    return np.array(clusters, np.float64)


def _figures(metric: Metric, sums: Array, grouped: bool) -> dict[str, Array]:
    figures = metric.figures(sums[..., :-_GROUP_COLUMNS])
    if grouped:
        figures["group_accuracy"] = sums[..., -2] / sums[..., -1]
    return figures


def _overall(kinds: Sequence[KindResult], draws: Sequence[_Draws], budgets: Sequence[int]) -> list[BudgetFigures]:
    overall = []
    for place, budget in enumerate(budgets):
        ratios = [kind.ratios[place] for kind in draws if kind.ratios is not None]
        overall.append(
            BudgetFigures(
                budget,
                {"mean": estimate(np.mean([kind.values[place] for kind in draws], axis=0))},
                estimate(np.mean(ratios, axis=0)) if ratios else None,
                sum(kind.budgets[place].cut_off for kind in kinds),
            )
        )
    return overall


def estimate(measured_and_draws: Array) -> Estimate:
    """Return the first of ``[1 + draws]`` with the interval of the others."""
    value = float(measured_and_draws[0])
    bounds = interval(measured_and_draws[1:])
    return Estimate(value if np.isfinite(value) else None, *(bounds or (None, None)))


def bootstrap_settings(seed: int) -> dict[str, float]:
    """Return how the intervals come about, for the record."""
    return {"level": LEVEL, "repeats": REPEATS, "seed": seed}


def table(results: Results) -> list[str]:
    """Return the lines of a table: one row per kind and budget, the overall mean last."""
    rows = [("kind", "figure", "questions", "budget", "value", f"relative to {results.visual_tokens}")]
    for kind in results.kinds:
        for figures in kind.budgets:
            for name, estimate in figures.figures.items():
                if name in (kind.headline, "group_accuracy"):
                    relative = figures.relative if name == kind.headline else None
                    rows.append(
                        (
                            kind.kind,
                            name,
                            str(kind.questions),
                            str(figures.budget),
                            text_of(estimate),
                            text_of(relative),
                        )
                    )
    if len(results.kinds) > 1:
        count = str(results.dataset.questions)
        rows += [
            ("all kinds", "mean", count, str(f.budget), text_of(f.figures["mean"]), text_of(f.relative))
            for f in results.overall
        ]
    return aligned(rows, right=(2, 3))


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Return ``rows`` as lines with columns of even width, those of ``right`` flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def text_of(estimate: Estimate | None) -> str:
    """Return a figure with its interval, or ``-`` where there is none."""
    if estimate is None or estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
