"""Tensor stages that torch selectors share. All of them export to plain ONNX operators with stable ties.

The loops carry tensors of one shape, because TensorRT asks for it; the budget only decides how often they turn and
how many positions count. Their bodies read sizes off the tensors that they are given: torch cannot trace a size from
outside where that is an input's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

# Below every likeness (-2..0) and merit (0..2), for entries that must never win a maximum. Finite, so that sums with it
# stay finite.
NEVER = -4.0


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


def share(ratio: float, budget: Tensor) -> Tensor:
    """Return ``floor(ratio * budget)`` as int64, right to the last token where a product falls on a whole number."""
    return torch.floor(ratio * budget.to(torch.float64)).to(torch.int64)


def mark(tokens: Tensor, live: Tensor) -> Tensor:
    """Return bool ``[B, N]``: for each token whether the place where it stands in ``tokens`` is ``live``.

    Args:
        tokens: int64 ``[B, N]``, all tokens in some order.
        live: bool ``[B, N]``, by place.
    """
    marks = live.float()
    return torch.zeros_like(marks).scatter(1, tokens, marks) > 0


def places(values: Tensor) -> Tensor:
    """Return the place of each of ``values`` ``[B, N]`` in its row: int64 ``[B, N]``, from 0."""
    return torch.arange(values.shape[1], device=values.device) + torch.zeros_like(values, dtype=torch.int64)


def bipartite(likeness: Tensor, scores: Tensor, important: Tensor, budget: Tensor, step: int) -> Tensor:
    """Keep the best ``important`` scores and thin the rest out pairwise (the authors' step); bool ``[B,N]``.

    The state is ``order`` ``[B,N]``: all tokens by position, of which the first ``live`` count, the residual. Even
    positions are sorted by their largest likeness to an odd one, and the odds follow; then the most redundant ``step``,
    which come first, are moved behind those that stay.
    """
    place = places(scores)
    target = budget - important

    def unfinished(live: Tensor, order: Tensor) -> Tensor:
        return live > target

    def thin(live: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        is_odd = (place % 2 == 1) & (place < live)
        redundancy = (likeness + torch.where(mark(order, is_odd), 0.0, NEVER)[:, None, :]).amax(-1)
        is_even = (place % 2 == 0) & (place < live)
        by_redundancy = descending(torch.where(is_even, redundancy.gather(1, order), NEVER))
        dropped = torch.minimum(torch.clamp(live - target, max=step), (live + 1) // 2)
        left = live - dropped
        source = torch.where(place < left, place + dropped, torch.where(place < live, place - left, place))
        return left, order.gather(1, by_redundancy).gather(1, source)

    by_score = descending(scores)
    count = place[0, -1] + 1
    residual = by_score.gather(1, (place + important) % count)
    live, order = while_loop(unfinished, thin, (count - important, residual))
    return mark(by_score, place < important) | mark(order, place < live)


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
        best = torch.where(kept, NEVER, merit).argmax(-1, keepdim=True)
        row = likeness.gather(1, best[:, :, None].expand(-1, 1, likeness.shape[2]))[:, 0]
        return turn + 1, torch.maximum(closeness, row), kept | (position == best)

    start = (
        torch.zeros_like(budget),
        torch.full((batch, count), NEVER / 2, device=scores.device),
        torch.zeros((batch, count), dtype=torch.bool, device=scores.device),
    )
    return while_loop(unfinished, pick, start)[2]


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
