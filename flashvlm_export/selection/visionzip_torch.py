"""VisionZip's rows as tensor operations that export (arXiv 2412.04467); :mod:`.visionzip_numpy` is the definition."""

from __future__ import annotations

from torch import Tensor, nn

from flashvlm_export.selection.config import VisionZipConfig
from flashvlm_export.selection.stages_torch import descending, mark, minmax, places, share


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
        place = places(saliency)
        contextual = share(self.config.contextual_ratio, budget)
        dominant = mark(descending(saliency), place < budget - contextual)
        # The longest step by which `contextual` tokens fit into the rest: a division, counted out to stay in integers.
        step = ((place + 1) * contextual <= count - budget + contextual).sum(-1, keepdim=True)
        rest = descending((~dominant).float())
        is_step = (place % step == 0) & (place < contextual * step)
        return dominant | mark(rest, is_step), minmax(saliency.float())
