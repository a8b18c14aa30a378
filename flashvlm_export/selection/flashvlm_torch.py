"""FlashVLM's selection as tensor operations that export to one ONNX graph (arXiv 2512.20561).

Everything is float32 whatever the precision around it: in float16 the sharpening ``exp(250 Δcos)`` leaves some tens
of distinct values for 576 patches, and ranks become arbitrary.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from flashvlm_export.selection.config import FlashVLMConfig
from flashvlm_export.selection.stages_torch import (
    NEVER,
    bipartite,
    farthest,
    likeness_matrix,
    minmax,
    share,
    unit_rows,
)


class FlashVLM(nn.Module):
    """Text-guided selection; see :class:`flashvlm_export.selection.Selector` for the signature of ``forward``."""

    def __init__(self, config: FlashVLMConfig) -> None:
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
        scores = self.fused_score(saliency, self.text_relevance(visual_tokens, text_embeds, text_mask))
        likeness = likeness_matrix(patch_features)
        important = share(self.config.important_ratio, budget)
        if self.config.diversity == "bipartite":
            kept = bipartite(likeness, scores, important, budget, self.config.merge_step)
        else:
            kept = farthest(likeness, scores, important, budget)
        return kept, scores

    def text_relevance(self, visual_tokens: Tensor, text_embeds: Tensor, text_mask: Tensor) -> Tensor:
        """Return sharpened relevance ``[B,N]``; 0 everywhere for rows without text."""
        cfg = self.config
        mask = text_mask[:, None, :]
        cosine = unit_rows(visual_tokens) @ unit_rows(text_embeds).transpose(1, 2)
        if cfg.weigh_text:
            lengths = torch.where(text_mask, text_embeds.float().norm(dim=-1), 0.0)
            cosine = cosine * (lengths / (lengths.amax(-1, keepdim=True) + 1e-6))[:, None, :]
        # Finite even where a row has no text at all, so that no NaN arises; such rows are zeroed below.
        weights = torch.softmax(torch.where(mask, cosine, NEVER) / cfg.relevance_temperature, dim=-1)
        relevance = (weights * torch.where(mask, cosine, 0.0)).sum(-1)
        sharpened = minmax(torch.softmax(relevance / cfg.sharpening_temperature, dim=-1) ** cfg.power)
        threshold = quantile(sharpened, cfg.quantile)
        damped = minmax(torch.where(sharpened >= threshold, sharpened, cfg.damping * sharpened))
        return damped * text_mask.any(-1, keepdim=True)

    def fused_score(self, saliency: Tensor, relevance: Tensor) -> Tensor:
        """Return the geometric mean of saliency and relevance ``[B,N]``, scaled to 0..1."""
        a = minmax(saliency.float()).clamp_min(1e-6)
        t = relevance.clamp_min(1e-6)
        return minmax(torch.exp((1 - self.config.eta) * torch.log(a) + self.config.eta * torch.log(t)))


def quantile(values: Tensor, q: float) -> Tensor:
    """Return the linearly interpolated ``q`` quantile along the last axis, kept as a dimension of size one."""
    # In whole numbers, so that a quantile that falls on a value is that value; and as a tensor, since the number of
    # values may be an input's.
    share = Fraction(q).limit_denominator(1 << 20)
    last = torch.arange(values.shape[-1], device=values.device)[-1:]
    low = share.numerator * last // share.denominator
    rest = share.numerator * last - low * share.denominator
    ordered = torch.sort(values, dim=-1, stable=True).values
    below, above = (ordered.index_select(-1, place) for place in (low, torch.minimum(low + 1, last)))
    return below + (rest / share.denominator) * (above - below)
