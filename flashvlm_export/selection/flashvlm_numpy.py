"""FlashVLM's selection for one image, written the way the paper tells it (arXiv 2512.20561).

Plain lists and sorts, float64, no thought for speed: this is what the exported graph has to reproduce.
"""

from __future__ import annotations

import numpy as np

from flashvlm_export.selection.config import FlashVLMConfig
from flashvlm_export.specs import Array


def select_image(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: FlashVLMConfig,
) -> Array:
    """Return the ``budget`` kept indices of one image, ascending (``[N,C] [N] [N,D] [L,D]`` → int64 ``[K]``)."""
    scores = fused_score(saliency, text_relevance(visual_tokens, text_embeds, config), config)
    by_score = np.argsort(-scores, kind="stable")
    important_count = config.important_tokens(budget)
    important, residual = by_score[:important_count], by_score[important_count:]
    features = _unit_rows(patch_features)
    if config.diversity == "bipartite":
        diverse = bipartite(features @ features.T, residual, budget - important_count, config.merge_step)
    else:
        diverse = farthest(features @ features.T, important, budget - important_count)
    return np.sort(np.concatenate([important, diverse])).astype(np.int64)


def text_relevance(visual_tokens: Array, text_embeds: Array, config: FlashVLMConfig) -> Array:
    """Return how much each visual token answers to the text, sharpened over the image (``[N]``, 0 without text)."""
    if len(text_embeds) == 0:
        return np.zeros(len(visual_tokens))
    cosine = _unit_rows(visual_tokens) @ _unit_rows(text_embeds).T
    relevance = (_softmax(cosine / config.relevance_temperature, axis=1) * cosine).sum(axis=1)
    sharpened = _minmax(_softmax(relevance / config.sharpening_temperature, axis=0) ** config.power)
    threshold = np.quantile(sharpened, config.quantile)
    return _minmax(np.where(sharpened >= threshold, sharpened, config.damping * sharpened))


def fused_score(saliency: Array, relevance: Array, config: FlashVLMConfig) -> Array:
    """Return the geometric mean of saliency and relevance, scaled to 0..1 (``[N]``)."""
    a = np.maximum(_minmax(saliency), 1e-6)
    t = np.maximum(relevance, 1e-6)
    return _minmax(np.exp((1 - config.eta) * np.log(a) + config.eta * np.log(t)))


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


def _unit_rows(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _minmax(values: Array) -> Array:
    return (values - values.min()) / (values.max() - values.min() + 1e-6)


def _softmax(values: Array, axis: int) -> Array:
    exponent = np.exp(values - values.max(axis=axis, keepdims=True))
    return exponent / exponent.sum(axis=axis, keepdims=True)
