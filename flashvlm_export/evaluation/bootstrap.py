"""Resampled sums: what the summed rows would have been with other questions of the same sort.

Percentile bootstrap (Efron and Tibshirani 1993, chapter 13). What is drawn are clusters: single questions, or groups of
questions that belong together. All budgets lie side by side in a row, so that each draw holds the same questions for
all of them; a ratio of two budgets is thereby paired.
"""

from __future__ import annotations

import numpy as np

from flashvlm_export.specs import Array

REPEATS = 2000
LEVEL = 0.95

_MOST_DRAWS_AT_ONCE = 4_000_000


def resampled_sums(rows: Array, *, seed: int, repeats: int = REPEATS) -> Array:
    """Return float64 ``[repeats, columns]``: sums over as many rows as there are, drawn with replacement.

    Args:
        rows: ``[clusters, columns]``, at least one cluster.
        seed: the same seed and rows give the same sums.
        repeats: number of draws.
    """
    # Equal rows are drawn as one, with their count as its weight: the same distribution, and most rows are equal.
    distinct, counts = np.unique(np.asarray(rows, np.float64), axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    total = int(counts.sum())
    sums = np.empty((repeats, distinct.shape[1]))
    step = max(_MOST_DRAWS_AT_ONCE // len(distinct), 1)
    for first in range(0, repeats, step):
        part = sums[first : first + step]
        part[:] = random.multinomial(total, counts / total, size=len(part)) @ distinct
    return sums


def interval(draws: Array) -> tuple[float, float] | None:
    """Return the bounds that hold 95 % of ``draws`` ``[repeats]``.

    A draw that is not defined (NaN, such as the F1 of questions none of which is about a thing that is there) may lie
    beyond either bound; ``None`` where there are too many of them for a bound.
    """
    tail = 100 * (1 - LEVEL) / 2
    low = np.percentile(np.where(np.isnan(draws), -np.inf, draws), tail, method="lower")
    high = np.percentile(np.where(np.isnan(draws), np.inf, draws), 100 - tail, method="higher")
    return (float(low), float(high)) if np.isfinite(low) and np.isfinite(high) else None
