"""VisionZip's rows as tensor operations that export (arXiv 2412.04467); :mod:`.visionzip_numpy` is the definition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashvlm_export.selection.config import VisionZipConfig
from flashvlm_export.selection.stages_torch import descending, mark, minmax, share


class VisionZip(nn.Module):
    """Attention for the dominant tokens, even steps for the contextual ones; the score is the attention."""

    def __init__(self, config: VisionZipConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        patch_features: Tensor,
        saliency: Tensor,
        visual_tokens: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
        budget: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(kept bool [B,N], scores float32 [B,N])``."""
        count = saliency.shape[1]
        position = torch.arange(count, device=saliency.device)
        contextual = share(self.config.contextual_ratio, budget)
        dominant = mark(descending(saliency), position < budget - contextual)
        # The longest step by which `contextual` tokens fit into the rest: a division, counted out to stay in integers.
        step = ((position + 1) * contextual <= count - budget + contextual).sum()
        rest = descending((~dominant).float())
        target = rest[:, torch.clamp(position * step, max=count - 1)]
        return dominant | mark(target, position < contextual), minmax(saliency.float())
