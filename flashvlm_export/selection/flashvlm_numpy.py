"""FlashVLM's selection for one image, written the way the paper tells it (arXiv 2512.20561).

Plain lists and sorts, float64, no thought for speed: this is what the exported graph has to reproduce.
"""

from __future__ import annotations

import numpy as np

from flashvlm_export.selection.config import FlashVLMConfig
from flashvlm_export.selection.stages_numpy import bipartite, farthest, minmax, unit_rows
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
    features = unit_rows(patch_features)
    if config.diversity == "bipartite":
        diverse = bipartite(features @ features.T, residual, budget - important_count, config.merge_step)
    else:
        diverse = farthest(features @ features.T, important, budget - important_count)
    return np.sort(np.concatenate([important, diverse])).astype(np.int64)


def text_relevance(visual_tokens: Array, text_embeds: Array, config: FlashVLMConfig) -> Array:
    """Return how much each visual token answers to the text, sharpened over the image (``[N]``, 0 without text)."""
    if len(text_embeds) == 0:
        return np.zeros(len(visual_tokens))
    relevance = token_relevance(visual_tokens, text_embeds, config)
    sharpened = minmax(_softmax(relevance / config.sharpening_temperature, axis=0) ** config.power)
    threshold = np.quantile(sharpened, config.quantile)
    return minmax(np.where(sharpened >= threshold, sharpened, config.damping * sharpened))


def token_relevance(visual_tokens: Array, text_embeds: Array, config: FlashVLMConfig) -> Array:
    """Return each visual token's likeness to the text, averaged over what is alike (``[N]``, from -1 to 1)."""
    cosine = unit_rows(visual_tokens) @ unit_rows(text_embeds).T
    if config.weigh_text:
        lengths = np.linalg.norm(text_embeds, axis=1)
        cosine = cosine * (lengths / (lengths.max() + 1e-6))
    relevance: Array = (_softmax(cosine / config.relevance_temperature, axis=1) * cosine).sum(axis=1)
    return relevance


def fused_score(saliency: Array, relevance: Array, config: FlashVLMConfig) -> Array:
    """Return the geometric mean of saliency and relevance, scaled to 0..1 (``[N]``)."""
    a = np.maximum(minmax(saliency), 1e-6)
    t = np.maximum(relevance, 1e-6)
    return minmax(np.exp((1 - config.eta) * np.log(a) + config.eta * np.log(t)))


def _softmax(values: Array, axis: int) -> Array:
    exponent = np.exp(values - values.max(axis=axis, keepdims=True))
    return exponent / exponent.sum(axis=axis, keepdims=True)
