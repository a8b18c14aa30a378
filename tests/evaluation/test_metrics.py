"""Metrics against values worked out by hand from their published definitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from flashvlm_export.evaluation.metrics import METRICS, anls, choice, exact, says_no, vqa_accuracy, yes_or_no
from flashvlm_export.evaluation.vqa_answers import normalise_answer


@dataclass(frozen=True)
class Ref:
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The two dogs", "2 dogs"),
        ("none", "0"),
        ("Ten o'clock.", "10 o'clock"),
        ("ten oclock", "10 o'clock"),
        ("3.5", "3.5"),  # a decimal point stays, a full stop goes
        ("yes.", "yes"),
        ("1,000 people", "1000 people"),  # a comma within a number: every mark is dropped
        ("red/blue", "red blue"),  # a mark between letters becomes a space
        ("red, blue", "red blue"),  # one beside a space is dropped
        ("t-shirt", "t shirt"),
        ("dont know", "don't know"),
        ("they'dve", "they'd've"),
        ("an apple\tand\na pear", "apple and pear"),
    ],
)
def test_vqa_normalisation(text: str, normalised: str) -> None:
    """Steps of vqaEval.py in the order of the script: punctuation, case, numbers, articles, contractions."""
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("matching", "score"),
    # With m of 10 annotators: m subsets leave a match out, (m-1)/3; 10-m leave another answer out, m/3; each at most 1.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_averages_over_leaving_each_annotator_out(matching: int, score: float) -> None:
    reference = Ref(("cat",) * matching + tuple(f"other {index}" for index in range(10 - matching)))
    assert vqa_accuracy("A cat.", reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("given", "answers", "score"),
    [
        ("Coca Cola", ("coca cola",), 1.0),  # case does not count
        ("coca  cola", ("coca cola",), 1.0),
        ("coca cola", ("pepsi", "coca-cola"), 1 - 1 / 9),  # one of nine letters, nearest answer
        ("abcd", ("abxy",), 0.5),  # a similarity of just 0.5 counts
        ("abcde", ("abxyz",), 0.0),  # 1 - 3/5 is below the threshold
        ("kitten", ("sitting",), 1 - 3 / 7),  # Levenshtein's textbook pair
        ("", ("x",), 0.0),
    ],
)
def test_anls(given: str, answers: tuple[str, ...], score: float) -> None:
    assert anls(given, Ref(answers)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("given", "score"),
    [("Dog", 1), (" dog.\n", 1), ('"dog"', 1), ("dogs", 0), ("a dog", 0), ("", 0), ("hot  dog", 1)],
)
def test_exact(given: str, score: int) -> None:
    assert exact(given, Ref(("dog", "Hot dog"))) == score


def test_an_empty_answer_is_not_a_mark() -> None:
    assert exact("", Ref(("?",))) == 0
    assert exact("?", Ref(("?",))) == 1


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("B", True),
        ("b", True),
        ("B.", True),
        ("(B)", True),
        ("B) a cat", True),
        ("B: a cat", True),
        ("B\nbecause", True),
        ("The answer is B.", True),
        ("The correct answer is: (B)", True),
        ("A cat", True),  # the words of option B; not the letter A
        ("a cat.", True),
        ("A", False),
        ("A. a cat", False),  # the letter decides
        ("C", False),
        ("E", False),
        ("Both", False),
        ("", False),
        ("I think it is a cat", False),
    ],
)
def test_multiple_choice(given: str, right: bool) -> None:
    options = ("a dog", "a cat", "a cow")
    assert choice(given, Ref(("B",), options)) == right
    assert choice(given, Ref(("a cat",), options)) == right


@pytest.mark.parametrize(
    ("given", "no"),
    [
        ("No", True),
        ("no, there is none", True),
        ("There is not. Yes", True),
        ("Yes. No doubt", False),  # only the first sentence counts
        ("Nothing", False),  # whole words
        ("perhaps", False),  # whatever is not no is yes
        ("", False),
    ],
)
def test_pope_reads_no(given: str, no: bool) -> None:
    assert says_no(given) is no


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("y", "yes"),
        ("Yes, it is", "yes"),
        ("No way", "no"),
        ("It is no", None),
        ("", None),
    ],
)
def test_mme_reads_the_first_four_characters(given: str, read: str | None) -> None:
    assert yes_or_no(given) == read


def test_pope_figures() -> None:
    """6 questions with an object, 4 without: of the former 4 are said to be there, of the latter 1.

    TP 4, FP 1, FN 2, TN 3: precision 4/5, recall 4/6, F1 = 2 * (4/5 * 4/6) / (4/5 + 4/6) = 8/11, accuracy 7/10, and
    yes is said to 5 of 10.
    """
    pope = METRICS["pope"]
    said = [("Yes", "yes")] * 4 + [("No", "yes")] * 2 + [("Yes", "no")] + [("no", "no")] * 3
    rows = np.array([pope.row(text, Ref((answer,))) for text, answer in said])
    figures = {name: float(value) for name, value in pope.figures(rows.sum(axis=0)).items()}
    assert figures == pytest.approx(
        {"f1": 8 / 11, "accuracy": 0.7, "precision": 0.8, "recall": 4 / 6, "yes_ratio": 0.5}
    )
    assert [pope.score(text, Ref((answer,))) for text, answer in said].count(1.0) == 7


@pytest.mark.parametrize("name", ["exact", "vqa", "choice", "anls", "yes_no"])
def test_the_other_figures_are_means(name: str) -> None:
    metric = METRICS[name]
    sums = np.array([[1.5, 3.0], [0.0, 3.0]])
    assert metric.figures(sums)[metric.headline].tolist() == [0.5, 0.0]
