"""Muon for matrices and Adam for the rest, with float32 copies of bfloat16 weights."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


def orthogonalised(stack: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al., 2024) on ``[S, m, n]``: singular values near one."""
    x = stack / (stack.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    flip = x.shape[-2] > x.shape[-1]
    x = (x.mT if flip else x).bfloat16()
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if flip else x).float()


class Optimiser:
    """Steps named bfloat16 parameters through float32 masters, which ``masters`` holds."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], *, muon_lr: float, adam_lr: float) -> None:
        self.parameters = parameters
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.masters = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
        self.first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.second = {name: torch.zeros_like(self.masters[name]) for name in parameters if not self._is_matrix(name)}
        self.groups: dict[torch.Size, list[str]] = defaultdict(list)
        for name in parameters:
            if self._is_matrix(name):
                self.groups[parameters[name].shape].append(name)
        self.steps = 0

    def _is_matrix(self, name: str) -> bool:
        inside = ".layers." in name or "projector" in name
        return inside and self.parameters[name].ndim == 2

    @torch.no_grad()
    def step(self, scale: float, clip: float = 1.0) -> None:
        """One update at ``scale`` times the learning rates; clears the gradients."""
        self.steps += 1
        gradients = {n: p.grad.float() for n, p in self.parameters.items() if p.grad is not None}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        shrink = float(min(1.0, clip / (float(norm) + 1e-6)))
        for shape, names in self.groups.items():
            present = [name for name in names if name in gradients]
            if not present:
                continue
            stack = torch.stack([gradients[name] for name in present])
            momentum = torch.stack([self.first[name] for name in present]).mul_(0.95).add_(stack)
            update = orthogonalised(stack + 0.95 * momentum) * 0.2 * max(shape) ** 0.5
            for name, moment, change in zip(present, momentum, update, strict=True):
                self.first[name].copy_(moment)
                self.masters[name].mul_(1 - 0.02 * scale * self.muon_lr).add_(change, alpha=-scale * self.muon_lr)
        for name, second in self.second.items():
            if name in gradients:
                gradient = gradients[name] * shrink
                first = self.first[name].lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.02)
                change = first / (1 - 0.9**self.steps) / ((second / (1 - 0.98**self.steps)).sqrt() + 1e-8)
                self.masters[name].add_(change, alpha=-scale * self.adam_lr)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
            parameter.grad = None

    @torch.no_grad()
    def rescale(self, name: str, factor: float) -> None:
        """Multiply a parameter."""
        self.masters[name].mul_(factor)
        self.parameters[name].copy_(self.masters[name])

    def state(self) -> dict[str, Any]:
        """For ``load``."""
        return {"masters": self.masters, "first": self.first, "second": self.second, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; the parameters too. What it does not have starts anew."""
        for mine, saved in (
            (self.masters, state["masters"]),
            (self.first, state["first"]),
            (self.second, state["second"]),
        ):
            for name in mine.keys() & saved.keys():
                mine[name].copy_(saved[name])
        self.steps = state["steps"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.masters[name])
