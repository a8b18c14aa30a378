"""Tensor stages that torch selectors share. All of them export to plain ONNX operators with stable ties."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Return ``rows`` scaled to length one along the last axis, in float32."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def likeness_matrix(rows: Tensor) -> Tensor:
    """Return ``cos - 1`` between all ``rows`` (``[B,N,C]`` → float32 ``[B,N,N]``, from -2 to 0), right to 1e-8.

    Selection ranks patches whose cosines differ by less than float32 resolves near 1, so neither a backend's order
    of summation nor its way to take a norm may show. ``cos - 1`` is finest where patches are most alike. Each unit
    row is split into a coarse part on a grid of 2^-10 and a small rest. Products of coarse parts are multiples of
    2^-20 whose partial sums stay below 2: exact in float32 in any order (and on TF32 units, which hold 11 bits).
    The rounding of what remains is far below that; it is computed as one half plus its transpose, which saves a
    product and makes the matrix symmetric. The squared length of a split row is known as precisely, and the error of
    its norm is taken out of the rest.
    """
    row = unit_rows(rows)
    coarse = torch.round(row * 1024.0) / 1024.0
    rest = row - coarse
    excess = ((coarse * coarse).sum(-1, keepdim=True) - 1.0) + ((row + coarse) * rest).sum(-1, keepdim=True)
    rest = rest - 0.5 * excess * row
    half = (coarse + 0.5 * rest) @ rest.transpose(1, 2)
    return (coarse @ coarse.transpose(1, 2) - 1.0) + (half + half.transpose(1, 2))


def minmax(values: Tensor) -> Tensor:
    """Return ``values`` scaled to 0..1 along the last axis."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low + 1e-6)


def descending(values: Tensor) -> Tensor:
    """Return the indices that sort the last axis from high to low; equal values keep their order."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices


def mark(tokens: Tensor, live: Tensor) -> Tensor:
    """Return bool ``[B, N]``: true for every token in ``tokens`` (int64 ``[B, P]``, values below N=P) that is ``live``.

    Dead entries are sent to a column of their own, so what they hold does not matter.
    """
    batch, count = tokens.shape
    slots = torch.where(live, tokens, count)
    marks = torch.zeros(batch, count + 1, dtype=torch.float32, device=tokens.device)
    return marks.scatter(1, slots, 1.0)[:, :count] > 0


def ascending_indices(kept: Tensor, budget: Tensor) -> Tensor:
    """Return the positions of true values in ``kept`` (bool ``[B, N]``, ``budget`` per row) as int64 ``[B, K]``.

    ``budget`` (int64 scalar) becomes the output's size: a data-dependent dimension in torch, a shape tensor in
    TensorRT.
    """
    count = kept.shape[1]
    k = int(budget.item())
    torch._check(k >= 1)
    torch._check(k <= count)
    return descending(kept.float())[:, :k]
