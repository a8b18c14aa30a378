"""Saliency of patches: the attention that they get in one layer, of which no map of all heads is made for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cls_attention(layer: Any, hidden: Tensor) -> Tensor:
    """Return the CLS query's attention to every patch in ``layer``, mean over heads: float32 ``[B,N]``.

    The keys are those that the layer computes anyway; graph optimisers merge the two.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    batch, length, _ = normed.shape
    heads, width = attention.num_heads, attention.head_dim
    query = attention.q_proj(normed[:, :1]).float().view(batch, 1, heads, width).transpose(1, 2)
    keys = attention.k_proj(normed).float().view(batch, length, heads, width).transpose(1, 2)
    weights = torch.softmax(query @ keys.transpose(2, 3) * attention.scale, dim=-1)
    return weights[:, :, 0, 1:].mean(1)


def layer_attention_received(layer: Any, hidden: Tensor) -> Tensor:
    """Return the attention that each patch of an encoder without CLS token receives in ``layer``: float32 ``[B,N]``.

    Summed over queries, mean over heads; queries and keys are those that the layer computes anyway.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query, key = (
        project(normed).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    return attention_received(query, key, attention.scale)


def attention_received(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None, is_patch: Tensor | None = None
) -> Tensor:
    """Return the attention that each patch receives, summed over queries, mean over heads: float32 ``[B, patches]``.

    Head by head, so that beside the map of all heads that attention itself makes, where it is not fused, there is no
    other.

    Args:
        query: ``[B, heads, patches, width]``.
        key: ``[B, heads, patches, width]``.
        scale: of their products.
        mask: ``[B, 1, 1, patches]``, added to them; ``None`` where all are patches.
        is_patch: bool ``[B, patches]``, which queries count; ``None`` for all.
    """
    heads = query.shape[1]
    total = torch.zeros_like(query[:, 0, :, 0], dtype=torch.float32)
    for head in range(heads):
        weights = query[:, head].float() @ key[:, head].float().transpose(1, 2) * scale
        weights = torch.softmax(weights if mask is None else weights + mask[:, 0].float(), dim=-1)
        total = total + (weights.sum(1) if is_patch is None else (is_patch.float()[:, None, :] @ weights)[:, 0])
    return total / heads
