"""Selectors side by side, on the same questions: ``comparison.json``, a table and a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flashvlm_export.errors import JournalError
from flashvlm_export.evaluation.dataset import Question
from flashvlm_export.evaluation.journal import JOURNAL, AnswerLine, RunSettings, read_answers
from flashvlm_export.evaluation.results import (
    Column,
    DataSetEntry,
    Estimate,
    aligned,
    by_kind,
    estimate,
    resampled_figures,
    text_of,
)
from flashvlm_export.specs import Array

SCHEMA_VERSION = 1
COMPARISON = "comparison.json"


@dataclass(frozen=True)
class SelectorFigures:
    """How one selector fares at one budget.

    Attributes:
        selector: its name.
        budget: visual tokens kept per image.
        kinds: headline figure of each kind.
        mean: of the kinds' headline figures.
        relative: mean of the kinds' figures over those without pruning; ``None`` if that was not run.
        ahead: ``mean`` minus that of the first selector at this budget, interval paired; 0 for the first one itself.
    """

    selector: str
    budget: int
    kinds: dict[str, Estimate]
    mean: Estimate
    relative: Estimate | None
    ahead: Estimate


@dataclass(frozen=True)
class Comparison:
    """``comparison.json``.

    Attributes:
        schema_version: of this record.
        model: name that was exported.
        precision: of the first selector's graph.
        dataset: which questions.
        visual_tokens: of one image without pruning.
        selectors: figures by selector, then by budget.
        settings: what the answers of each selector depend on.
        bootstrap: how the intervals came about.
        tools: versions of this package and of Python.
    """

    schema_version: int
    model: str
    precision: str
    dataset: DataSetEntry
    visual_tokens: int
    selectors: list[SelectorFigures]
    settings: dict[str, RunSettings]
    bootstrap: dict[str, float]
    tools: dict[str, str] = field(default_factory=dict)


def compare(
    questions: Sequence[Question],
    keys: Sequence[str],
    budgets: Sequence[int],
    answers: Mapping[str, Mapping[tuple[str, int], AnswerLine]],
    *,
    visual_tokens: int,
    seed: int,
) -> list[SelectorFigures]:
    """Return the figures of every selector, the first of which the others are measured against.

    Args:
        questions: all answered by all selectors at all ``budgets``.
        keys: their hashes.
        budgets: in the order of the result.
        answers: by selector, then by question hash and budget.
        visual_tokens: the budget that counts as no pruning.
        seed: of the bootstrap.
    """
    cells = [(name, budget) for name in answers for budget in budgets]
    columns: list[Column] = [{key: answers[name][key, budget] for key in keys} for name, budget in cells]
    kinds: dict[str, list[Array]] = {}
    for kind, items in by_kind(questions, keys).items():
        headline = items[0][1].metric.headline
        kinds[kind] = [found[headline] for found in resampled_figures(kind, items, columns, seed)]
    first = next(iter(answers))
    place = {cell: number for number, cell in enumerate(cells)}
    means: list[Array] = [np.mean([values[number] for values in kinds.values()], axis=0) for number in place.values()]

    def relative(number: int) -> Estimate | None:
        if visual_tokens not in budgets:
            return None
        unpruned = place[first, visual_tokens]
        with np.errstate(divide="ignore", invalid="ignore"):
            return estimate(np.mean([values[number] / values[unpruned] for values in kinds.values()], axis=0))

    return [
        SelectorFigures(
            name,
            budget,
            {kind: estimate(values[number]) for kind, values in kinds.items()},
            estimate(means[number]),
            relative(number),
            estimate(means[number] - means[place[first, budget]]),
        )
        for (name, budget), number in place.items()
    ]


def neighbours(
    output: Path, own: Collection[str], settings: RunSettings, keys: Sequence[str], budgets: Sequence[int]
) -> tuple[dict[str, tuple[RunSettings, dict[tuple[str, int], AnswerLine]]], list[str]]:
    """Return what lies beside a run's own directories in ``output`` and can be compared with it, by directory name.

    Args:
        output: of the run.
        own: names of its directories.
        settings: of one of them: the same weights and length of answers are what makes others comparable.
        keys: hashes of the questions that have to be answered.
        budgets: at these.

    Returns:
        Settings and answers by directory name, and a line on each directory that is left out.
    """
    found: dict[str, tuple[RunSettings, dict[tuple[str, int], AnswerLine]]] = {}
    notes = []
    for folder in sorted(path.parent for path in output.glob(f"*/{JOURNAL}")):
        if folder.name in own:
            continue
        try:
            theirs, answers = read_answers(folder)
        except JournalError as error:
            notes.append(f"{folder} is not compared: {error.what}")
            continue
        differing = [
            name for name in ("weights_sha256", "max_new_tokens") if getattr(theirs, name) != getattr(settings, name)
        ]
        if differing:
            notes.append(f"{folder} is not compared: another {differing[0]}")
        elif not all((key, budget) in answers for key in keys for budget in budgets):
            notes.append(f"{folder} is not compared: answers are missing")
        else:
            found[folder.name] = theirs, answers
    return found, notes


def comparison_table(comparison: Comparison) -> list[str]:
    """Return the lines of a table: one row per selector and budget."""
    first = comparison.selectors[0].selector
    rows = [("selector", "budget", "mean", f"relative to {comparison.visual_tokens}", f"ahead of {first}")]
    rows += [
        (
            row.selector,
            str(row.budget),
            text_of(row.mean),
            text_of(row.relative),
            "" if row.selector == first else text_of(row.ahead),
        )
        for row in comparison.selectors
    ]
    return aligned(rows, right=(1,))
