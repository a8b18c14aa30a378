"""DivPrune as tensor operations that export (arXiv 2503.02175); :mod:`.divprune_numpy` is the definition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashvlm_export.selection.config import DivPruneConfig
from flashvlm_export.selection.stages_torch import NEVER, farthest, likeness_matrix, minmax


class DivPrune(nn.Module):
    """Greedy max-min diversity of the visual tokens; the score is the distance to the nearest other token."""

    def __init__(self, config: DivPruneConfig) -> None:
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
        likeness = likeness_matrix(visual_tokens)
        place = torch.arange(likeness.shape[1], device=likeness.device)
        itself = place[:, None] == place  # torch.eye exports as uint16, which TensorRT does not read
        distance = -torch.where(itself, NEVER, likeness).amax(-1)
        return farthest(likeness, distance, torch.ones_like(budget), budget), minmax(distance)
