"""VisPruner's selection for one image (arXiv 2412.01818, `code <https://github.com/Theia-4869/VisPruner>`_).

The share ``important_ratio`` of the budget goes to what CLS attends to most. Of the rest, duplicates are taken out
round by round: the residual, in order of attention, is split in two by position, and those tokens of the one half that
resemble one of the other half most are dropped. It is the step ``bipartite`` of FlashVLM, without its text.

What differs from the released code: equal keys keep their order, where its sort promises nothing, and a residual of
odd length works.
"""

from __future__ import annotations

import numpy as np

from flashvlm_export.selection.config import VisPrunerConfig
from flashvlm_export.selection.stages_numpy import bipartite, unit_rows
from flashvlm_export.specs import Array


def select_image(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: VisPrunerConfig,
) -> Array:
    """Return the kept indices of one image, ascending (``[N,C] [N] [N,D] [L,D]`` → int64 ``[K]``)."""
    by_attention = np.argsort(-saliency, kind="stable")
    count = config.important_tokens(budget)
    important, residual = by_attention[:count], by_attention[count:]
    features = unit_rows(patch_features)
    diverse = bipartite(features @ features.T, residual, budget - count, config.merge_step)
    return np.sort(np.concatenate([important, diverse]))
