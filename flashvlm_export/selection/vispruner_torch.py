"""VisPruner as tensor operations that export (arXiv 2412.01818); :mod:`.vispruner_numpy` is the definition."""

from __future__ import annotations

from torch import Tensor, nn

from flashvlm_export.selection.config import VisPrunerConfig
from flashvlm_export.selection.stages_torch import bipartite, likeness_matrix, minmax, share


class VisPruner(nn.Module):
    """Attention for one half, a bipartite removal of duplicates for the other; the score is the attention."""

    def __init__(self, config: VisPrunerConfig) -> None:
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
        important = share(self.config.important_ratio, budget)
        kept = bipartite(likeness_matrix(patch_features), saliency.float(), important, budget, self.config.merge_step)
        return kept, minmax(saliency.float())
