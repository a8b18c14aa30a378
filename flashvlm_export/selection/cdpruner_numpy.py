"""CDPruner's selection for one image (arXiv 2506.10967, `code <https://github.com/Theia-4869/CDPruner>`_).

The kept tokens are the mode of a determinantal point process, greedily: with the kernel ``L_ij = r_i S_ij r_j``, where
``S`` is the cosine of visual tokens and ``r`` their relevance to the instruction, each step adds the token that makes
the determinant of the kept part of ``L`` largest. Token ``i`` multiplies it by ``r_i ** 2`` times the *conditional
variance* of ``i``: what the kept tokens leave unexplained of it in ``S``, the diagonal of a Schur complement.

What differs: for LLaVA, the released code takes ``r`` from CLIP: the *negative* cosine of its image side with its text
encoder, an inversion that the authors saw in CLIP alone. A LLaVA checkpoint does not hold that encoder, so ``r`` here
is the mean cosine of a visual token with the LLM's embeddings of the text, not negated. It is scaled as in the released
code, but image by image instead of over the batch. Below a conditional variance of ``SPANNED``, a token counts as
explained and relevance decides alone; there the released code divides rounding errors by each other.
"""

from __future__ import annotations

import numpy as np

from flashvlm_export.selection.config import CDPrunerConfig
from flashvlm_export.selection.stages_numpy import unit_rows
from flashvlm_export.specs import Array

# A hundred times what float32 leaves of a variance that is zero.
SPANNED = 1e-5


def select_image(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: CDPrunerConfig,
) -> Array:
    """Return the kept indices of one image, ascending (``[N,C] [N] [N,D] [L,D]`` → int64 ``[K]``)."""
    tokens = unit_rows(visual_tokens)
    return np.sort(most_likely(tokens @ tokens.T, relevance(visual_tokens, text_embeds), budget))


def relevance(visual_tokens: Array, text_embeds: Array) -> Array:
    """Return how much each visual token answers to the text (``[N,D] [L,D]`` → ``[N]``, 0 < r ≤ 1, 1 without text)."""
    text = unit_rows(text_embeds).sum(axis=0) / max(len(text_embeds), 1)
    mean = unit_rows(visual_tokens) @ text
    return (mean - mean.min() + 1e-6) / (mean.max() - mean.min() + 1e-6)


def most_likely(cosine: Array, quality: Array, count: int) -> Array:
    """Return ``count`` tokens in the order in which they are picked (``[N,N] [N]`` → int64 ``[K]``)."""
    unexplained = cosine.copy()
    # Without text all tokens are equal at first; rounding of what is one must not choose among them.
    np.fill_diagonal(unexplained, 1.0)
    kept: list[int] = []
    for _ in range(count):
        merit = quality**2 * np.maximum(unexplained.diagonal(), SPANNED)
        merit[kept] = -np.inf
        pick = int(np.argmax(merit))
        kept.append(pick)
        row = unexplained[pick]
        unexplained = unexplained - np.outer(row, row) / max(row[pick], SPANNED)
    return np.array(kept, np.int64)
