"""The rows that VisionZip builds on, for one image (arXiv 2412.04467, `code
<https://github.com/dvlab-research/VisionZip>`_).

*Dominant* tokens are those that CLS attends to most. The others, in the order of the image, are represented by
*contextual* tokens at even steps; the method is commonly run with 10 of 64, 20 of 128 and 30 of 192.

What differs: the paper adds to each contextual token the others that resemble it most (by the keys of the attention
layer) and passes the mean on, before the projector. A selector keeps rows and does not change them, so the contextual
tokens here are as the encoder made them: this is VisionZip without its merging. The paper counts CLS as one of the
dominant tokens; LLaVA's visual tokens do not hold it, so one more patch is dominant instead.
"""

from __future__ import annotations

import numpy as np

from flashvlm_export.selection.config import VisionZipConfig
from flashvlm_export.specs import Array


def select_image(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: VisionZipConfig,
) -> Array:
    """Return the kept indices of one image, ascending (``[N,C] [N] [N,D] [L,D]`` → int64 ``[K]``)."""
    by_attention = np.argsort(-saliency, kind="stable")
    count = config.important_tokens(budget)
    dominant, rest = by_attention[:count], np.sort(by_attention[count:])
    contextual = rest[:0] if budget == count else rest[:: len(rest) // (budget - count)][: budget - count]
    return np.sort(np.concatenate([dominant, contextual]))
