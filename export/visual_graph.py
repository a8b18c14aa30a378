"""The fused graph as one torch module: encoder, projector, selection, and the gather of what is kept.

And its second half alone, for images that were encoded before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashvlm_export.errors import CheckpointError
from flashvlm_export.export.checkpoint import WeightSource
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.progress import Progress
from flashvlm_export.selection import Selector
from flashvlm_export.selection.stages_torch import ascending_indices
from flashvlm_export.specs import Precision


class VisualGraph(nn.Module):
    """See :func:`flashvlm_export.specs.visual_graph_spec` for the inputs and the first three outputs.

    More outputs, ``patch_features``, ``saliency`` where the selector needs it, and all ``projected_tokens``, exist for
    the checks and are dropped from the file that ships.
    """

    def __init__(self, encoder: nn.Module, selector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.selector = selector

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return ``visual_tokens [B,K,D], visual_indices [B,K], scores [B,N]``, then what the encoder gave."""
        *vision, text_embeds, text_mask, budget = inputs
        features, saliency, tokens = self.encoder(*vision)
        # The checks have to see the very tensors that selection sees: ONNX Runtime on a CPU computes float16 graphs in
        # float32 and rounds only at the outputs.
        features32, tokens32 = features.float(), tokens.float()
        kept, scores = self.selector(features32, saliency, tokens32, text_embeds.float(), text_mask, budget)
        gathered, indices = _gather(tokens, kept, budget)
        seen = (features32, tokens32) if saliency is None else (features32, saliency, tokens32)
        return gathered, indices, scores, *seen


class SelectorGraph(nn.Module):
    """See :func:`flashvlm_export.specs.selector_spec` for inputs and outputs."""

    def __init__(self, selector: nn.Module) -> None:
        super().__init__()
        self.selector = selector

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return ``visual_tokens [B,K,D], visual_indices [B,K], scores [B,N]``."""
        patch_features, saliency, projected_tokens, text_embeds, text_mask, budget = inputs
        kept, scores = self.selector(
            patch_features.float(), saliency, projected_tokens.float(), text_embeds.float(), text_mask, budget
        )
        return *_gather(projected_tokens, kept, budget), scores


def _gather(tokens: Tensor, kept: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of ``tokens`` that are marked as kept, and their ascending indices."""
    indices = ascending_indices(kept, budget)
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2])), indices


def build_visual_graph(
    adapter: Adapter,
    weights: WeightSource,
    selector: Selector,
    config: Any,
    precision: Precision,
    progress: Progress | None = None,
    *,
    needs_saliency: bool = False,
) -> VisualGraph:
    """Return the module with its weights read from ``weights`` in ``precision``; nothing else is read.

    ``needs_saliency`` computes saliency even where ``selector`` does without.

    Raises:
        CheckpointError: if a tensor is missing, misshapen, not finite, or overflows float16.
    """
    encoder: Any = adapter.encoder(needs_saliency=needs_saliency or selector.needs_saliency)
    dtype = getattr(torch, precision.float_dtype)
    tensors = {}
    for name, parameter in (progress or Progress()).track(list(encoder.named_parameters()), "tensors"):
        tensor = weights.read(name, tuple(parameter.shape))
        tensors[name] = tensor.to(dtype)
        if tensor.dtype != dtype and not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(
                f"tensor '{name}' overflows in {precision.value}",
                received=f"largest magnitude {float(tensor.abs().max()):.3g}",
                expected=f"at most {torch.finfo(dtype).max:.3g}",
                hint="export this model in fp32",
            )
    encoder.load(tensors)
    return VisualGraph(encoder, selector.make_module(config)).eval()
