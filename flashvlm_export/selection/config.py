"""Settings of the selectors; defaults are those of the authors' released implementations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flashvlm_export.errors import ConfigError

Diversity = Literal["bipartite", "farthest"]
DIVERSITIES: tuple[Diversity, ...] = ("bipartite", "farthest")
_ANY = float("inf")


class _Settings:
    """What all settings have.

    Attributes:
        rounding: relative noise on the inputs that does to the oracle's decisions what float32 does to the graph's.
            Noise of e on each of C channels moves a cosine by e / sqrt(C), float32 by up to sqrt(C) of its last place,
            6e-8: as much, for some hundred channels. Two tokens that this exchanges are a tie.
    """

    rounding: ClassVar[float] = 5e-6


@dataclass(frozen=True)
class FlashVLMConfig(_Settings):
    """How FlashVLM weighs saliency, relevance and diversity (arXiv 2512.20561).

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
        weigh_text: whether a text token counts by the length of its embedding, relative to the longest of the prompt,
            as in the authors' variant for Qwen2.5-VL.

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
    weigh_text: bool = False

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
        _check_ranges(
            self,
            {
                "eta": (0.0, 1.0),
                "relevance_temperature": (1e-6, _ANY),
                "sharpening_temperature": (1e-6, _ANY),
                "power": (1e-6, _ANY),
                "quantile": (0.0, 1.0),
                "damping": (0.0, 1.0),
                "important_ratio": (0.0, 1.0),
                "merge_step": (1, 1 << 30),
            },
        )


@dataclass(frozen=True)
class SoftFlashVLMConfig(FlashVLMConfig):
    """FlashVLM with settings that are ahead of the defaults at small budgets, on ``flashvlm-tiny``: docs/selection.md.

    Relevance is sharpened less, so that more than one spot of the image counts as relevant, and background is chosen by
    distance. Attributes are those of :class:`FlashVLMConfig`.
    """

    diversity: Diversity = "farthest"
    sharpening_temperature: float = 0.05


class _KeepsBestScores(_Settings):
    """For selectors whose kept tokens all follow one score, so that rounding moves them only at its border."""

    is_stable: ClassVar[bool] = True

    def important_tokens(self, budget: int) -> int:
        """Return ``budget``: every token goes to the best scores."""
        return budget


@dataclass(frozen=True)
class RandomConfig(_KeepsBestScores):
    """Chance.

    Attributes:
        seed: which shuffling, 0 or more; report the mean over several.

    Raises:
        ConfigError: if ``seed`` is negative.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _check_ranges(self, {"seed": (0, (1 << 63) - 1)})


@dataclass(frozen=True)
class UniformConfig(_KeepsBestScores):
    """An even grid has nothing to set."""


@dataclass(frozen=True)
class ClsAttentionConfig(_KeepsBestScores):
    """The best of CLS attention has nothing to set."""


@dataclass(frozen=True)
class VisPrunerConfig(_Settings):
    """How VisPruner divides the budget (arXiv 2412.01818).

    Attributes:
        important_ratio: share of the budget given to attention, ``0..1``; the rest goes to diversity.
        merge_step: tokens dropped per round.

    Raises:
        ConfigError: if a value is outside its range.
    """

    important_ratio: float = 0.5
    merge_step: int = 8

    is_stable: ClassVar[bool] = False

    def important_tokens(self, budget: int) -> int:
        """Return how many of ``budget`` tokens go to the highest attention."""
        return int(self.important_ratio * budget)

    def __post_init__(self) -> None:
        _check_ranges(self, {"important_ratio": (0.0, 1.0), "merge_step": (1, 1 << 30)})


@dataclass(frozen=True)
class VisionZipConfig(_Settings):
    """How VisionZip divides the budget (arXiv 2412.04467).

    Attributes:
        contextual_ratio: share of the budget for contextual tokens, ``0..1``; commonly 10 of 64, 20 of 128,
            30 of 192.

    Raises:
        ConfigError: if the ratio is outside its range.
    """

    contextual_ratio: float = 10 / 64

    # One dominant token exchanged shifts the steps of the contextual ones.
    is_stable: ClassVar[bool] = False

    def important_tokens(self, budget: int) -> int:
        """Return how many of ``budget`` tokens are dominant."""
        return budget - int(self.contextual_ratio * budget)

    def __post_init__(self) -> None:
        _check_ranges(self, {"contextual_ratio": (0.0, 1.0)})


@dataclass(frozen=True)
class DivPruneConfig(_Settings):
    """DivPrune has nothing to set (arXiv 2503.02175)."""

    # Everything hangs on which token comes first.
    is_stable: ClassVar[bool] = False

    def important_tokens(self, budget: int) -> int:
        """Return 0: distances decide, no score does."""
        return 0


@dataclass(frozen=True)
class CDPrunerConfig(_Settings):
    """CDPruner has nothing to set (arXiv 2506.10967)."""

    # What is left unexplained shrinks with every token kept, and the differences between tokens with it.
    is_stable: ClassVar[bool] = False
    rounding: ClassVar[float] = 3e-5

    def important_tokens(self, budget: int) -> int:
        """Return 0: no token is kept for its relevance alone."""
        return 0


def _check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(
                f"selection setting '{name}' is out of range", received=value, expected=f"{low} to {high}"
            )
