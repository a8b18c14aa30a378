"""FlashVLM's selection as tensor operations that export to one ONNX graph (arXiv 2512.20561).

Everything is float32 whatever the precision around it: in float16 the sharpening ``exp(250 Δcos)`` leaves some tens
of distinct values for 576 patches, and ranks become arbitrary.

The two diversity loops carry tensors of fixed shape, because TensorRT asks for it; the budget only decides how often
they turn and how many positions count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from flashvlm_export.selection.config import FlashVLMConfig
from flashvlm_export.selection.stages_torch import descending, likeness_matrix, mark, minmax, unit_rows

# Below every likeness (-2..0) and merit (0..2), for entries that must never win a maximum. Finite, so that sums with it
# stay finite.
_NEVER = -4.0


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
        important = torch.floor(self.config.important_ratio * budget.to(torch.float64)).to(torch.int64)
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
        # Finite even where a row has no text at all, so that no NaN arises; such rows are zeroed below.
        weights = torch.softmax(torch.where(mask, cosine, _NEVER) / cfg.relevance_temperature, dim=-1)
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
    position = q * (values.shape[-1] - 1)
    low = math.floor(position)
    top = torch.topk(values, values.shape[-1] - low, dim=-1).values
    below = top[:, -1:]
    return below if position == low else below + (position - low) * (top[:, -2:-1] - below)


def bipartite(likeness: Tensor, scores: Tensor, important: Tensor, budget: Tensor, step: int) -> Tensor:
    """Keep the best ``important`` scores and thin the rest out pairwise (the authors' step); bool ``[B,N]``.

    The state is ``order`` ``[B,N]``: the residual tokens by position, of which the first ``live`` count. Even
    positions are sorted by their largest likeness to an odd one, the most redundant ``step`` are cut off, and the
    odds follow.
    """
    count = scores.shape[1]
    half = (count + 1) // 2
    position = torch.arange(count, device=scores.device)
    target = budget - important

    def unfinished(live: Tensor, order: Tensor) -> Tensor:
        return live > target

    def thin(live: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        evens, odds = order[:, 0::2], order[:, 1::2]
        is_odd = mark(order, (position % 2 == 1) & (position < live))
        redundancy = (likeness + torch.where(is_odd, 0.0, _NEVER)[:, None, :]).amax(-1)
        evens = evens.gather(1, descending(torch.where(position[0::2] < live, redundancy.gather(1, evens), _NEVER)))
        live_evens = (live + 1) // 2
        dropped = torch.minimum(torch.clamp(live - target, max=step), live_evens)
        kept_evens = live_evens - dropped
        source = torch.where(position < kept_evens, position + dropped, half + position - kept_evens)
        order = torch.cat([evens, odds], dim=1)[:, torch.clamp(source, max=count - 1)]
        return live - dropped, order

    by_score = descending(scores)
    residual = by_score[:, torch.clamp(position + important, max=count - 1)]
    live, order = while_loop(unfinished, thin, (count - important, residual))
    return mark(by_score, position < important) | mark(order, position < live)


def farthest(likeness: Tensor, scores: Tensor, important: Tensor, budget: Tensor) -> Tensor:
    """Keep the best ``important`` scores, then what is least similar to all kept so far; bool ``[B,N]``.

    One loop picks all ``budget`` tokens: the first ``important`` follow the score, the others the farthest point.
    (TensorRT-RTX 1.7.1 cannot start the carried closeness from a row maximum of the matrix that the loop reads.)
    """
    batch, count = scores.shape
    position = torch.arange(count, device=scores.device)

    def unfinished(turn: Tensor, closeness: Tensor, kept: Tensor) -> Tensor:
        return turn < budget

    def pick(turn: Tensor, closeness: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        merit = torch.where(turn < important, scores, -closeness)
        best = torch.where(kept, _NEVER, merit).argmax(-1, keepdim=True)
        row = likeness.gather(1, best[:, :, None].expand(-1, 1, count))[:, 0]
        return turn + 1, torch.maximum(closeness, row), kept | (position == best)

    start = (
        torch.zeros_like(budget),
        torch.full((batch, count), _NEVER / 2, device=scores.device),
        torch.zeros((batch, count), dtype=torch.bool, device=scores.device),
    )
    return while_loop(unfinished, pick, start)[2]
