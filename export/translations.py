"""ONNX translations of torch operators that ``torch.onnx`` does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op


def stable_sort(self: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """``aten.sort.stable`` as TopK over the whole axis: ONNX gives equal values in order of their index."""
    axis = dim % len(self.shape)
    size = op.Shape(self, start=axis, end=axis + 1)
    return op.TopK(self, size, axis=axis, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: stable_sort}
