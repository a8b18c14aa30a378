"""Widening attention heads to sizes that ONNX Runtime's attention takes; the model computes the same as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# ONNX Runtime's GroupQueryAttention refuses others once it rotates positions itself.
HEAD_SIZE_MULTIPLE = 16
# Without a norm over each head, which would count the zeros.
PADDABLE = ("llama", "mistral", "qwen2")


def head_size(config: Any) -> int:
    """Return the channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def pad_heads(config: Any, tensors: Iterable[tuple[str, Tensor]]) -> tuple[Any, Iterable[tuple[str, Tensor]]]:
    """Return an equivalent model whose head size is a multiple of 16; the same one if it is already.

    Zeros are added to both halves of each head, since rotary embedding turns channel ``i`` with ``i + size / 2``. Its
    frequencies ``theta^(-2i / size)`` stay the same with ``theta' = theta^(padded / size)``. Attention divides by the
    root of the head size; queries are scaled to make up for the larger one.

    Args:
        config: text configuration of one of :data:`PADDABLE`, changed in place.
        tensors: names as in the causal LM's state dict, and their weights; read lazily.
    """
    size = head_size(config)
    padded = -(-size // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE
    if padded == size:
        return config, tensors
    config.head_dim = padded
    config.rope_parameters["rope_theta"] **= padded / size
    return config, _padded(tensors, size, padded)


def _padded(tensors: Iterable[tuple[str, Tensor]], size: int, padded: int) -> Iterator[tuple[str, Tensor]]:
    missing = (padded - size) // 2
    for name, tensor in tensors:
        projection = name.split(".")[-2]
        if projection in ("q_proj", "k_proj", "v_proj"):
            halves = pad(tensor.reshape(-1, size // 2, *tensor.shape[1:]).movedim(1, -1), (0, missing)).movedim(-1, 1)
            tensor = halves.reshape(-1, *tensor.shape[1:])
            if projection == "q_proj":
                # float32, or rounding the factor into half-precision weights would show.
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * (padded / size) ** 0.5
        elif projection == "o_proj" and name.endswith("weight"):
            tensor = pad(tensor.reshape(len(tensor), -1, size // 2), (0, missing)).reshape(len(tensor), -1)
        yield name, tensor
