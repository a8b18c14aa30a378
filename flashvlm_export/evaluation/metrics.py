"""Each metric as published: what one answer is worth, and the figures over many.

A metric turns an answer into a short row of numbers; a figure is a function of the summed rows. So a bootstrap only has
to sum rows anew, for a mean and for F1 alike.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from flashvlm_export.evaluation.vqa_answers import normalise_answer
from flashvlm_export.specs import Array

_ANLS_THRESHOLD = 0.5
_FEWEST_ANNOTATORS = 4


class Reference(Protocol):
    """What an answer is held against."""

    @property
    def answers(self) -> Sequence[str]:
        """Right answers, or one per annotator."""

    @property
    def choices(self) -> Sequence[str]:
        """Texts of the options A, B, ..., if it is multiple choice."""


@dataclass(frozen=True)
class Metric:
    """One way to score.

    Attributes:
        name: in the data set.
        headline: the figure that tables and plots show.
        score: answer and reference → from 0 (wrong) to 1 (right).
        row: answer and reference → numbers that may be summed over questions.
        figures: sums ``[..., numbers]`` → figures ``[...]`` by name; NaN where one is not defined.
        problem: why a reference cannot be used with this metric, or ``None``.
    """

    name: str
    headline: str
    score: Callable[[str, Reference], float]
    row: Callable[[str, Reference], tuple[float, ...]]
    figures: Callable[[Array], dict[str, Array]]
    problem: Callable[[Reference], str | None]


def exact(text: str, reference: Reference) -> float:
    """Return 1 if ``text`` is one of the answers, whatever the case, spaces and closing punctuation."""
    return float(_plain(text) in {_plain(answer) for answer in reference.answers})


def vqa_accuracy(text: str, reference: Reference) -> float:
    """Return the soft accuracy of VQA: min(matches / 3, 1), averaged over leaving out each annotator in turn.

    Antol et al. 2015 (https://arxiv.org/abs/1505.00468) and https://visualqa.org/evaluation.html.
    """
    answers = [normalise_answer(answer) for answer in reference.answers]
    matches = answers.count(normalise_answer(text))
    with_match_left_out, others = min((matches - 1) / 3, 1.0), min(matches / 3, 1.0)
    return (matches * with_match_left_out + (len(answers) - matches) * others) / len(answers)


def anls(text: str, reference: Reference) -> float:
    """Return the normalised Levenshtein similarity to the nearest answer, or 0 where it is below 0.5.

    Biten et al. 2019 (https://arxiv.org/abs/1905.13648), as the challenges on ST-VQA and DocVQA compute it: lower case,
    single spaces, the longer text's length as the norm.
    """
    given = " ".join(text.lower().split())
    best = max(_similarity(given, " ".join(answer.lower().split())) for answer in reference.answers)
    return best if best >= _ANLS_THRESHOLD else 0.0


def choice(text: str, reference: Reference) -> float:
    """Return 1 if ``text`` names the right option: by its letter, first or after "answer is", or by its words."""
    return float(chosen_option(text, reference.choices) == _right_option(reference))


def chosen_option(text: str, choices: Sequence[str]) -> int | None:
    """Return the index of the option that an answer names, or ``None``.

    ``B``, ``b``, ``(B)``, ``B.``, ``B: a cat``, ``The answer is B`` and, where no letter is named, ``a cat``.
    """
    letters = string.ascii_uppercase[: len(choices)]
    answer = text.strip()
    if len(answer) == 1 and answer.upper() in letters:
        return letters.index(answer.upper())
    named = re.match(rf"\(?([{letters}])(?:[.):,]|\s*$|\n)", answer) or re.search(
        rf"[Aa]nswer is:? *\(?([{letters}])\b", answer
    )
    if named:
        return letters.index(named.group(1))
    spoken = [index for index, option in enumerate(choices) if _plain(option) == _plain(answer)]
    return spoken[0] if len(spoken) == 1 else None


def says_no(text: str) -> bool:
    """Return whether POPE's evaluation reads an answer as no: ``no`` or ``not`` in its first sentence; else it is yes.

    https://github.com/RUCAIBox/POPE (``evaluate.py``).
    """
    words = text.strip().partition(".")[0].replace(",", "").split()
    return any(word in ("No", "no", "not") for word in words)


def yes_or_no(text: str) -> str | None:
    """Return how MME's evaluation reads an answer: ``yes`` or ``no`` among its first four characters, or ``None``.

    https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (``calculation.py``).
    """
    answer = text.lower().strip().replace(".", "")
    if answer in ("y", "n"):
        return {"y": "yes", "n": "no"}[answer]
    return next((word for word in ("yes", "no") if word in answer[:4]), None)


def _yes_no_score(text: str, reference: Reference) -> float:
    return float(yes_or_no(text) == _plain(reference.answers[0]))


def _pope_score(text: str, reference: Reference) -> float:
    return float(says_no(text) == (_plain(reference.answers[0]) == "no"))


def _pope_row(text: str, reference: Reference) -> tuple[float, ...]:
    """Return (true positive, false positive, false negative, true negative), of which one is 1; yes is positive."""
    said_yes, is_yes = not says_no(text), _plain(reference.answers[0]) == "yes"
    return (
        float(said_yes and is_yes),
        float(said_yes and not is_yes),
        float(not said_yes and is_yes),
        float(not said_yes and not is_yes),
    )


def _pope_figures(sums: Array) -> dict[str, Array]:
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "f1": 2 * tp / (2 * tp + fp + fn),
            "accuracy": (tp + tn) / (tp + fp + fn + tn),
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "yes_ratio": (tp + fp) / (tp + fp + fn + tn),
        }


def _mean(name: str, headline: str, score: Callable[[str, Reference], float], problem: _Problem) -> Metric:
    """Return a metric whose one figure is the mean score."""
    return Metric(
        name,
        headline,
        score,
        lambda text, reference: (score(text, reference), 1.0),
        lambda sums: {headline: sums[..., 0] / sums[..., 1]},
        problem,
    )


_Problem = Callable[[Reference], "str | None"]


def _blank(reference: Reference) -> str | None:
    return None if all(answer.strip() for answer in reference.answers) else "an answer is blank"


def _too_few_annotators(reference: Reference) -> str | None:
    if len(reference.answers) >= _FEWEST_ANNOTATORS:
        return None
    count = len(reference.answers)
    return f"vqa needs one answer per annotator, from {_FEWEST_ANNOTATORS} or more (as published, 10), not {count}"


def _no_options(reference: Reference) -> str | None:
    count = len(reference.choices)
    if not 2 <= count <= len(string.ascii_uppercase):
        return f"choice needs 2 to 26 choices, not {count}"
    if any(not option.strip() for option in reference.choices):
        return "a choice is blank"
    if len(reference.answers) != 1 or _right_option(reference) is None:
        last = string.ascii_uppercase[count - 1]
        return f"choice needs one answer, a letter from A to {last} or the text of one of the choices"
    return None


def _not_yes_or_no(reference: Reference) -> str | None:
    if [_plain(answer) in ("yes", "no") for answer in reference.answers] == [True]:
        return None
    return "the answer has to be yes or no, one of them"


def _right_option(reference: Reference) -> int | None:
    return chosen_option(reference.answers[0], reference.choices)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip("\"'").rstrip(".,;:!?").strip() or text.strip()


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1.0 if longest == 0 else 1 - _levenshtein(one, other) / longest


def _levenshtein(one: str, other: str) -> int:
    distances = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        corner, distances[0] = distances[0], row
        for column, opposite in enumerate(other, start=1):
            replaced = corner + (letter != opposite)
            corner = distances[column]
            distances[column] = min(replaced, corner + 1, distances[column - 1] + 1)
    return distances[-1]


#: By name.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            _mean("exact", "accuracy", exact, _blank),
            _mean("vqa", "accuracy", vqa_accuracy, _too_few_annotators),
            Metric("pope", "f1", _pope_score, _pope_row, _pope_figures, _not_yes_or_no),
            _mean("choice", "accuracy", choice, _no_options),
            _mean("anls", "anls", anls, _blank),
            _mean("yes_no", "accuracy", _yes_no_score, _not_yes_or_no),
        )
    }
)
