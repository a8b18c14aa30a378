"""How like two graphs' readings of the same images are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashvlm_export.calibration.readings import Reading
from flashvlm_export.errors import ConfigError
from flashvlm_export.specs import Array


@dataclass(frozen=True)
class Likeness:
    """Figures over some images; 1 is alike everywhere but in ``max_error``.

    Attributes:
        cosine: of visual tokens, mean over patches, of the image where it is least.
        worst_token_cosine: of the single visual token where it is least.
        max_error: largest error of a visual token's value, relative to the largest magnitude.
        iou: intersection over union of the kept sets, mean over images.
        important_iou: the same for the important part, the best scores.
        coverage: largest cosine of a patch to a kept one (in the reference's features), mean over patches and images,
            divided by the same for the reference's kept set.
    """

    cosine: float
    worst_token_cosine: float
    max_error: float
    iou: float
    important_iou: float
    coverage: float

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f}, IoU {self.iou:.3f}, important part {self.important_iou:.3f}, "
            f"coverage {self.coverage:.3f}"
        )


@dataclass(frozen=True)
class Tolerance:
    """How far INT8 may be from the graph that it was made of; 0 asks for nothing.

    Attributes:
        cosine: least :attr:`Likeness.cosine`.
        iou: least IoU: of the kept set where the selector's settings call it stable, as with ``farthest``; else of its
            important part, as with ``bipartite``, whose other half hangs on rounding (see docs/selection.md).
        coverage: least :attr:`Likeness.coverage`, asked for only where the kept set is not stable.
    """

    cosine: float = 0.99
    iou: float = 0.90
    coverage: float = 0.97

    def __str__(self) -> str:
        return f"cosine {self.cosine}, IoU {self.iou}, coverage {self.coverage}"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"the tolerance '{name}' is out of range", received=value, expected="0 to 1")

    def used(self, likeness: Likeness, *, whole_set: bool) -> float:
        """Return the share of this tolerance that ``likeness`` uses up: at most 1 where it holds.

        Args:
            likeness: what was measured.
            whole_set: judge the whole kept set, not its important part and coverage.
        """
        shares = [
            _share(likeness.cosine, self.cosine),
            _share(likeness.iou if whole_set else likeness.important_iou, self.iou),
        ]
        if not whole_set:
            shares.append(_share(likeness.coverage, self.coverage))
        return max(shares)


def compare(references: Sequence[Reading], readings: Sequence[Reading], important: int) -> Likeness:
    """Return how like ``readings`` are to ``references``, image by image.

    Args:
        references: of the graph in floating point.
        readings: of the other graph on the same images; their features are not looked at.
        important: size of the important part of the kept set.
    """
    cosines, errors, ious, important_ious, coverages, own_coverages = [], [], [], [], [], []
    for want, have in zip(references, readings, strict=True):
        cosines.append(_cosines(want.tokens, have.tokens))
        errors.append(float(np.abs(want.tokens - have.tokens).max() / max(float(np.abs(want.tokens).max()), 1e-30)))
        ious.append(_iou(want.kept, have.kept))
        important_ious.append(_iou(_best(want.scores, important), _best(have.scores, important)))
        coverages.append(_coverage(want.features, have.kept))
        own_coverages.append(_coverage(want.features, want.kept))
    return Likeness(
        # NumPy's, which NaN passes through: min() and max() drop one that does not come first.
        cosine=float(np.min([cosine.mean() for cosine in cosines])),
        worst_token_cosine=float(np.min([cosine.min() for cosine in cosines])),
        max_error=float(np.max(errors)),
        iou=float(np.mean(ious)),
        important_iou=float(np.mean(important_ious)),
        coverage=float(np.mean(coverages) / np.mean(own_coverages)),
    )


def _share(value: float, least: float) -> float:
    """Return 0 for 1 and where nothing is asked for, 1 for ``least``, more below; NaN is beyond everything."""
    if value != value:
        return float("inf")
    if value >= 1.0 or least <= 0.0:
        return 0.0
    return (1.0 - value) / max(1.0 - least, 1e-9)


def _cosines(want: Array, have: Array) -> Array:
    want, have = want.astype(np.float64), have.astype(np.float64)
    lengths = np.linalg.norm(want, axis=1) * np.linalg.norm(have, axis=1)
    products: Array = (want * have).sum(1) / np.maximum(lengths, 1e-30)
    return products


def _iou(one: Array, other: Array) -> float:
    union = np.union1d(one, other).size
    return np.intersect1d(one, other).size / union if union else 1.0


def _best(scores: Array, count: int) -> Array:
    indices: Array = np.argsort(-scores, kind="stable")[:count]
    return indices


def _coverage(features: Array, kept: Array) -> float:
    unit = features.astype(np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return float((unit @ unit[kept].T).max(1).mean())
