"""Intervals against theory: the normal approximation, known coverage, and pairing."""

from __future__ import annotations

import numpy as np
import pytest

from flashvlm_export.evaluation.bootstrap import interval, resampled_sums


def test_the_interval_of_a_mean_is_that_of_the_central_limit_theorem() -> None:
    scores = np.random.default_rng(0).random(2000)
    draws = resampled_sums(scores[:, None], seed=1, repeats=4000)[:, 0] / len(scores)
    low, high = interval(draws) or (np.nan, np.nan)
    half = 1.959964 * scores.std() / np.sqrt(len(scores))
    assert low == pytest.approx(scores.mean() - half, abs=0.08 * half)
    assert high == pytest.approx(scores.mean() + half, abs=0.08 * half)


def test_each_draw_holds_as_many_rows_as_there_are() -> None:
    rows = np.array([[1.0, 5.0], [1.0, 5.0], [1.0, 7.0]])
    sums = resampled_sums(rows, seed=0, repeats=20_000)
    assert (sums[:, 0] == 3).all()
    assert set(sums[:, 1]) == {15.0, 17.0, 19.0, 21.0}
    # How often the third row is drawn is binomial: 3 draws with probability 1/3.
    assert sums[:, 1].mean() == pytest.approx(17, abs=0.05)


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    """Proportions of 0.8 in samples of 200; 600 intervals, so that 95 % has a standard error of 0.9 %."""
    random = np.random.default_rng(3)
    held = 0
    for seed in range(600):
        sample = (random.random(200) < 0.8).astype(float)
        low, high = interval(resampled_sums(sample[:, None], seed=seed, repeats=400)[:, 0] / 200) or (np.nan, np.nan)
        held += low <= 0.8 <= high
    assert 0.915 <= held / 600 <= 0.975


def test_columns_are_drawn_together() -> None:
    """A ratio of a column to itself has no spread, whatever the columns have."""
    scores = np.random.default_rng(0).random((100, 1))
    sums = resampled_sums(np.hstack([scores, scores]), seed=0)
    assert np.ptp(sums[:, 0]) > 1
    np.testing.assert_allclose(sums[:, 0] / sums[:, 1], 1)


def test_the_seed_decides() -> None:
    rows = np.random.default_rng(0).random((50, 1))
    first = resampled_sums(rows, seed=7)
    assert (first == resampled_sums(rows, seed=7)).all()
    assert (first != resampled_sums(rows, seed=8)).any()


def test_draws_that_are_not_defined_may_lie_anywhere() -> None:
    draws = np.linspace(0, 1, 1000)
    low, high = interval(draws) or (np.nan, np.nan)
    draws[500:520] = np.nan
    wide = interval(draws) or (np.nan, np.nan)
    # 20 of 1000 draws take up 20 of the 25 that may lie below, and as many of those above.
    assert (low, high) == pytest.approx((0.025, 0.975), abs=0.002)
    assert wide == pytest.approx((0.005, 0.995), abs=0.002)
    draws[500:530] = np.nan
    assert interval(draws) is None
