"""DivPrune's selection for one image (arXiv 2503.02175, `code <https://github.com/vbdi/divprune>`_).

The kept tokens solve the max-min diversity problem greedily: their smallest distance, one minus the cosine of visual
tokens as the LLM sees them, is to be as large as possible. The first token is the one whose nearest other is farthest;
each further one is the farthest from all kept so far.

What differs from the released code: where distances tie, as among identical tokens, a kept token is never picked again.
"""

from __future__ import annotations

import numpy as np

from flashvlm_export.selection.config import DivPruneConfig
from flashvlm_export.selection.stages_numpy import farthest, unit_rows
from flashvlm_export.specs import Array


def select_image(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: DivPruneConfig,
) -> Array:
    """Return the kept indices of one image, ascending (``[N,C] [N] [N,D] [L,D]`` → int64 ``[K]``)."""
    tokens = unit_rows(visual_tokens)
    cosine = tokens @ tokens.T
    nearest = np.where(np.eye(len(tokens), dtype=bool), -np.inf, cosine).max(axis=1)
    first = np.array([np.argmin(nearest)])
    return np.sort(np.concatenate([first, farthest(cosine, first, budget - 1)]))
