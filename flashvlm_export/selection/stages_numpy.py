"""Stages that the NumPy definitions share, for one image, in float64 and without thought for speed."""

from __future__ import annotations

import numpy as np

from flashvlm_export.specs import Array


def unit_rows(rows: Array) -> Array:
    """Return ``rows`` scaled to length one (``[N,C]``; a row of zeros stays)."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def minmax(values: Array) -> Array:
    """Return ``values`` scaled to 0..1."""
    return (values - values.min()) / (values.max() - values.min() + 1e-6)


def bipartite(cosine: Array, residual: Array, count: int, step: int) -> Array:
    """Thin ``residual`` out to ``count``: drop those even positions that resemble an odd position most."""
    while len(residual) > count:
        evens, odds = residual[0::2], residual[1::2]
        likeness = cosine[np.ix_(evens, odds)].max(axis=1, initial=-np.inf)
        evens = evens[np.argsort(-likeness, kind="stable")]
        residual = np.concatenate([evens[min(step, len(residual) - count) :], odds])
    return residual


def farthest(cosine: Array, important: Array, count: int) -> Array:
    """Return ``count`` more tokens, each the one least similar to all kept before it (greedy farthest point).

    Where nothing is kept yet (no important tokens), all are equally far: the lowest index comes first.
    """
    kept = list(important)
    closeness = cosine[:, important].max(axis=1, initial=-np.inf)
    for _ in range(count):
        closeness[kept] = np.inf
        pick = int(np.argmin(closeness))
        kept.append(pick)
        closeness = np.maximum(closeness, cosine[pick])
    return np.array(kept[len(important) :], dtype=np.int64)
