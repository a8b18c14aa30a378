"""What every method has to beat, as tensor operations; :mod:`.baselines_numpy` says what each keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flashvlm_export.selection.baselines_numpy import grid_side, shuffled
from flashvlm_export.selection.config import ClsAttentionConfig, RandomConfig, UniformConfig
from flashvlm_export.selection.stages_torch import descending, mark, minmax, places


def _places(count: int, seed: int) -> list[int]:
    """Return where in the shuffling each token stands."""
    places: list[int] = shuffled(count, seed).argsort().tolist()
    return places


# Not traced but called once: a table in the exported graph.
_constant_places: Callable[[int, int], list[int]] = torch.compiler.assume_constant_result(_places)


class Random(nn.Module):
    """One shuffling for every image; scores fall from 1 along it."""

    def __init__(self, config: RandomConfig) -> None:
        super().__init__()
        self.config = config

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
        batch, count, _ = visual_tokens.shape
        places = torch.tensor(_constant_places(count, self.config.seed), device=visual_tokens.device)
        places = places.expand(batch, -1)
        return places < budget, 1.0 - places.float() / count


class UniformGrid(nn.Module):
    """Even places of the patch grid; the score is 1 for what is kept and 0 for the rest."""

    def __init__(self, config: UniformConfig) -> None:
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
        batch, count, _ = visual_tokens.shape
        side = grid_side(count)
        edges = torch.arange(side + 1, device=visual_tokens.device)
        rows = (edges * edges < budget).sum()
        tokens_above = _before(_before(edges, rows, side), budget, rows)
        in_row = tokens_above.diff()[:, None]
        kept = _before(edges, in_row, side).diff().flatten() > 0
        kept = kept.expand(batch, -1)
        return kept, kept.float()


class ClsAttention(nn.Module):
    """The best of the attention that CLS pays to each patch."""

    def __init__(self, config: ClsAttentionConfig) -> None:
        super().__init__()

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
        return mark(descending(saliency), places(saliency) < budget), minmax(saliency.float())


def _before(place: Tensor, count: Tensor, size: Tensor | int) -> Tensor:
    """Return how many of ``count`` things, spread over ``size`` places, lie before ``place``; all int64."""
    return (2 * place * count + size) // (2 * size)
