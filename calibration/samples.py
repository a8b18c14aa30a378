"""What calibration looks at: one image with one text, as inputs of the visual graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flashvlm_export.specs import Array

T = TypeVar("T")

# Held-out images are run through three graphs; more of them cost time and move the figures little.
_MOST_HELD_OUT = 8


@dataclass(frozen=True)
class Sample:
    """One image with one text.

    Attributes:
        name: for messages, such as the file's name.
        key: changes whenever the inputs do: the caches go by it.
        feeds: makes the graph's inputs (batch 1); called whenever they are needed, so that they need not be kept.
    """

    name: str
    key: str
    feeds: Callable[[], dict[str, Array]]


@dataclass(frozen=True)
class Split:
    """Which samples set the ranges and which ones the result is judged on."""

    calibration: list[Sample]
    held_out: list[Sample]

    @property
    def judged(self) -> list[Sample]:
        """The held-out samples; with a single image, that image."""
        return self.held_out or self.calibration


def split_samples(samples: Sequence[Sample]) -> Split:
    """Hold out every fourth sample, at least one where there are two, at most 8, spread over the list."""
    count = min(_MOST_HELD_OUT, max(len(samples) // 4, 1)) if len(samples) > 1 else 0
    chosen = set(spread(range(len(samples)), count))
    return Split(
        [sample for index, sample in enumerate(samples) if index not in chosen],
        [sample for index, sample in enumerate(samples) if index in chosen],
    )


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` of ``items``, spread evenly over the list."""
    count = min(count, len(items))
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def combined_key(parts: Sequence[str]) -> str:
    """Return one SHA-256 over ``parts``."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
