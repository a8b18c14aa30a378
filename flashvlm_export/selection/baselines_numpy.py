"""What every method has to beat, for one image: chance, an even grid, and the attention of CLS alone.

Arguments are those of :func:`flashvlm_export.selection.select_tokens` for one image; each returns the kept indices,
ascending, int64 ``[K]``.
"""

from __future__ import annotations

import math

import numpy as np

from flashvlm_export.errors import ConfigError
from flashvlm_export.selection.config import ClsAttentionConfig, RandomConfig, UniformConfig
from flashvlm_export.specs import Array


def random_tokens(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: RandomConfig,
) -> Array:
    """Keep the first ``budget`` of one shuffling of all tokens, the same for every image."""
    return np.sort(shuffled(len(visual_tokens), config.seed)[:budget])


def shuffled(count: int, seed: int) -> Array:
    """Return the numbers below ``count`` in an order that hangs on ``seed`` alone (int64 ``[count]``).

    Raw draws of PCG64 are the same in every release of NumPy; those of its ``Generator`` are not promised to be.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").astype(np.int64)


def uniform_grid(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: UniformConfig,
) -> Array:
    """Keep ``budget`` places spread evenly over the patch grid: ``ceil(sqrt(budget))`` rows, evenly filled.

    Tokens are dealt out to the rows, rows to the height of the grid and the tokens of each row to its width, all by one
    rule: the ``i``-th of ``count`` things goes to the middle of its share of ``size`` places, the lower of two middles.
    """
    side = grid_side(len(visual_tokens))
    rows = math.isqrt(budget - 1) + 1
    row_of_token = _spread(budget, rows)
    kept = [
        height * side + column
        for row, height in enumerate(_spread(rows, side))
        for column in _spread(row_of_token.count(row), side)
    ]
    return np.array(kept, np.int64)


def grid_side(count: int) -> int:
    """Return the side of a square grid of ``count`` patches.

    Raises:
        ConfigError: if there is none.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise ConfigError(
            "the selector 'uniform' needs a square grid of patches", received=count, expected="a square, such as 576"
        )
    return side


def cls_attention(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    budget: int,
    config: ClsAttentionConfig,
) -> Array:
    """Keep what CLS attends to most; where two are equal, the lower index."""
    return np.sort(np.argsort(-saliency, kind="stable")[:budget])


def _spread(count: int, size: int) -> list[int]:
    return [math.ceil(size * (2 * i + 1) / (2 * count)) - 1 for i in range(count)]
