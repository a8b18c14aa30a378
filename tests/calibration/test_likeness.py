"""Figures of likeness, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from flashvlm_export.calibration.likeness import Likeness, Tolerance, compare
from flashvlm_export.calibration.readings import Reading
from flashvlm_export.errors import ConfigError


def reading(kept: list[int], scores: list[float], tokens: list[list[float]] | None = None) -> Reading:
    features = np.eye(4, dtype=np.float32)
    given = np.array(tokens or [[1, 0], [0, 2], [1, 0], [0, 1]], np.float32)
    return Reading(given, features, np.array(kept), np.array(scores, np.float32))


def test_the_same_is_alike_in_everything() -> None:
    same = reading([0, 2], [0.9, 0.1, 0.8, 0.2])
    likeness = compare([same], [same], 1)
    assert likeness == Likeness(1.0, 1.0, 0.0, 1.0, 1.0, 1.0)
    assert Tolerance(1.0, 1.0, 1.0).used(likeness, whole_set=True) == 0.0


def test_each_figure_by_hand() -> None:
    want = reading([0, 2], [0.9, 0.1, 0.8, 0.2])
    # One of four tokens turned by a right angle; one of two kept patches exchanged; the two best scores the same.
    have = reading([0, 3], [0.8, 0.1, 0.9, 0.2], [[1, 0], [0, 2], [0, 1], [0, 1]])
    likeness = compare([want], [have], 2)
    assert likeness.cosine == pytest.approx(0.75)
    assert likeness.worst_token_cosine == pytest.approx(0.0)
    assert likeness.max_error == pytest.approx(1.0 / 2.0)
    assert likeness.iou == pytest.approx(1 / 3)
    assert likeness.important_iou == 1.0
    assert likeness.coverage == 1.0
    narrower = compare([want], [reading([0], [0.1, 0.9, 0.8, 0.2])], 1)
    assert narrower.coverage == pytest.approx(0.5)
    assert narrower.important_iou == 0.0


def test_images_are_averaged_but_the_worst_counts_for_cosine() -> None:
    want = reading([0, 2], [0.9, 0.1, 0.8, 0.2])
    other = reading([1, 3], [0.9, 0.1, 0.8, 0.2], [[1, 0], [0, 2], [0, 1], [0, 1]])
    likeness = compare([want, want], [want, other], 1)
    assert likeness.cosine == pytest.approx(0.75)
    assert likeness.iou == pytest.approx(0.5)


def test_tolerance_judges_the_whole_set_or_its_important_part() -> None:
    likeness = Likeness(0.995, 0.9, 0.1, iou=0.5, important_iou=0.95, coverage=0.985)
    tolerance = Tolerance(cosine=0.99, iou=0.9, coverage=0.97)
    assert tolerance.used(likeness, whole_set=True) == pytest.approx(5.0)
    assert tolerance.used(likeness, whole_set=False) == pytest.approx(0.5)
    assert Tolerance(0.99, 0.9, 0.99).used(likeness, whole_set=False) == pytest.approx(1.5)


def test_figures_that_are_no_numbers_never_pass() -> None:
    likeness = Likeness(float("nan"), 1.0, 0.0, 1.0, 1.0, 1.0)
    assert Tolerance(0.0, 0.0, 0.0).used(likeness, whole_set=True) > 1.0


@pytest.mark.parametrize("values", [{"cosine": 1.5}, {"iou": -0.1}])
def test_tolerances_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Tolerance(**values)


def test_a_tolerance_of_zero_asks_for_nothing() -> None:
    likeness = Likeness(0.995, 0.9, 0.1, iou=0.0, important_iou=0.0, coverage=0.5)
    for whole_set in (True, False):
        assert Tolerance(0.99, 0.0, 0.0).used(likeness, whole_set=whole_set) == pytest.approx(0.5)
