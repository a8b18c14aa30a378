"""Settings of the FlashVLM selector (arXiv 2512.20561; defaults of the authors' released implementation)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from flashvlm_export.errors import ConfigError

Diversity = Literal["bipartite", "farthest"]
DIVERSITIES: tuple[Diversity, ...] = ("bipartite", "farthest")


@dataclass(frozen=True)
class FlashVLMConfig:
    """How FlashVLM weighs saliency, relevance and diversity.

    Attributes:
        diversity: how the background tokens are thinned out. ``bipartite`` is the authors' step and the default of
            parity with them; ``farthest`` (greedy farthest point) keeps the same tokens under rounding.
        eta: weight of text relevance against saliency in the log domain, ``0..1``.
        relevance_temperature: softmax temperature over text tokens.
        sharpening_temperature: softmax temperature over patches.
        power: exponent applied to the sharpened relevance.
        quantile: relevance at or above this quantile passes undamped, ``0..1``.
        damping: factor on relevance below the quantile.
        important_ratio: share of the budget given to the best scores, ``0..1``; the rest goes to diversity.
        merge_step: tokens dropped per round of ``bipartite``.

    Raises:
        ConfigError: if a value is outside its range.
    """

    diversity: Diversity = "bipartite"
    eta: float = 0.5
    relevance_temperature: float = 0.05
    sharpening_temperature: float = 0.01
    power: float = 2.5
    quantile: float = 0.995
    damping: float = 0.1
    important_ratio: float = 0.5
    merge_step: int = 8

    @property
    def is_stable(self) -> bool:
        """Whether the whole kept set, and not only its important part, withstands rounding of the features."""
        return self.diversity == "farthest"

    def important_tokens(self, budget: int) -> int:
        """Return how many of ``budget`` tokens go to the best scores."""
        return int(self.important_ratio * budget)

    def __post_init__(self) -> None:
        if self.diversity not in DIVERSITIES:
            raise ConfigError(
                "unknown diversity step", received=repr(self.diversity), expected=f"one of {', '.join(DIVERSITIES)}"
            )
        ranges = {
            "eta": (0.0, 1.0),
            "relevance_temperature": (1e-6, float("inf")),
            "sharpening_temperature": (1e-6, float("inf")),
            "power": (1e-6, float("inf")),
            "quantile": (0.0, 1.0),
            "damping": (0.0, 1.0),
            "important_ratio": (0.0, 1.0),
            "merge_step": (1, 1 << 30),
        }
        for field in fields(self):
            if field.name in ranges:
                low, high = ranges[field.name]
                value = getattr(self, field.name)
                if not low <= value <= high:
                    raise ConfigError(
                        f"selection setting '{field.name}' is out of range",
                        received=value,
                        expected=f"{low} to {high}",
                    )
