"""CDPruner as tensor operations that export (arXiv 2506.10967); :mod:`.cdpruner_numpy` is the definition.

The released code carries the rows of a Cholesky factor of the whole kernel, relevance included. Relevance cancels out
of the conditional variances, so the loop here carries a Schur complement of the cosines alone: relevances of 1e-6 do
not meet similarities of 1 in one sum. The first complement is written in ``cos - 1``, where tokens that are alike lose
no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from flashvlm_export.selection.cdpruner_numpy import SPANNED
from flashvlm_export.selection.config import CDPrunerConfig
from flashvlm_export.selection.stages_torch import NEVER, likeness_matrix, unit_rows


class CDPruner(nn.Module):
    """Greedy mode of a determinantal point process conditioned on the text; the score is the relevance."""

    def __init__(self, config: CDPrunerConfig) -> None:
        super().__init__()

    def forward(
        self,
        patch_features: Tensor,
        saliency: Tensor | None,
        visual_tokens: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
        budget: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(kept bool [B,N], scores float32 [B,N])``."""
        scores = relevance(visual_tokens, text_embeds, text_mask)
        return most_likely(likeness_matrix(visual_tokens), scores, budget), scores


def relevance(visual_tokens: Tensor, text_embeds: Tensor, text_mask: Tensor) -> Tensor:
    """Return how much each visual token answers to the text ``[B,N]``, ``0 < r <= 1``; 1 for rows without text."""
    mask = text_mask[:, :, None]
    text = torch.where(mask, unit_rows(text_embeds), 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    mean = (unit_rows(visual_tokens) * text).sum(-1)
    low, high = mean.amin(-1, keepdim=True), mean.amax(-1, keepdim=True)
    return (mean - low + 1e-6) / (high - low + 1e-6)


def most_likely(likeness: Tensor, quality: Tensor, budget: Tensor) -> Tensor:
    """Mark ``budget`` tokens, each the one that makes the determinant of the kept kernel largest; bool ``[B,N]``."""
    count = quality.shape[1]
    position = torch.arange(count, device=quality.device)

    def unfinished(turn: Tensor, unexplained: Tensor, variance: Tensor, kept: Tensor) -> Tensor:
        return turn < budget

    def pick(turn: Tensor, unexplained: Tensor, variance: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        left = variance.clamp_min(SPANNED)
        best = torch.where(kept, NEVER, quality * quality * left).argmax(-1, keepdim=True)
        row = _row(unexplained, best)
        step = row / left.gather(1, best)
        unexplained = unexplained - step[:, :, None] * row[:, None, :]
        return turn + 1, unexplained, variance - step * row, kept | (position == best)

    first = quality.argmax(-1, keepdim=True)
    row = _row(likeness, first)
    across, down = row[:, None, :], row[:, :, None]
    # The diagonal is carried beside its matrix: ONNX has no operator to take it out.
    unexplained, variance = likeness - across - down - across * down, -row * (2.0 + row)
    return while_loop(unfinished, pick, (torch.ones_like(budget), unexplained, variance, position == first))[3]


def _row(matrix: Tensor, index: Tensor) -> Tensor:
    """Return row ``index[b]`` of each matrix (``[B,N,N] [B,1]`` → ``[B,N]``)."""
    return matrix.gather(1, index[:, :, None].expand(-1, 1, matrix.shape[2]))[:, 0]
