"""Which layers suffer from INT8, and leaving the worst of them in float16 until the tolerance holds.

1. Everything quantised: does the tolerance hold already?
2. Each layer quantised alone, ranked by the share of the tolerance that it uses up.
3. If 1 failed: the fewest of the worst layers, found by bisection over the ranking, without which the tolerance holds.

That is ``layers + log2(layers) + 2`` graphs at most, each run once per image and loaded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flashvlm_export.calibration.layers import Layer
from flashvlm_export.calibration.likeness import Likeness, Tolerance
from flashvlm_export.errors import CalibrationError
from flashvlm_export.progress import Progress

#: Measures the graph in which exactly these layers are quantised.
Measure = Callable[[Sequence[Layer]], Likeness]

# At least this share of the weights has to become INT8, or the graph is not worth its name.
_LEAST_QUANTISED = 0.5
_WHOLE_SET, _PARTS = "kept set", "important part and coverage"


@dataclass(frozen=True)
class LayerEffect:
    """What INT8 in one layer alone does.

    Attributes:
        layer: its name.
        nodes: its products in the graph.
        weights: number of its weights.
        share: of the tolerance that it uses up alone.
        likeness: to the graph in which nothing is quantised.
        excluded: whether it stays in float16.
    """

    layer: str
    nodes: list[str]
    weights: int
    share: float
    likeness: Likeness
    excluded: bool


@dataclass(frozen=True)
class Sensitivity:
    """The table that is written into the bundle.

    Attributes:
        tolerance: what had to hold, and what ``share`` is a share of.
        enforced: whether layers were excluded for it.
        judged_on: ``kept set`` or ``important part and coverage``.
        budget: visual tokens kept while measuring.
        images: names of the images measured on.
        runs: graph runs that it took.
        everything: all layers quantised.
        chosen: the layers of the result quantised.
        layers: worst first; empty if the pass was left out.
    """

    tolerance: Tolerance
    enforced: bool
    judged_on: str
    budget: int
    images: list[str]
    runs: int
    everything: Likeness
    chosen: Likeness
    layers: list[LayerEffect] = field(default_factory=list)

    @property
    def excluded(self) -> list[str]:
        """Names of the layers that stay in float16."""
        return [effect.layer for effect in self.layers if effect.excluded]

    def require_tolerance(self) -> None:
        """Raise :class:`CalibrationError` if a tolerance that is enforced does not hold, with the figures."""
        if not self.enforced or self.tolerance.used(self.chosen, whole_set=self.judged_on == _WHOLE_SET) <= 1.0:
            return
        raise CalibrationError(
            "INT8 does not come within the tolerance",
            received=f"all layers: {self.everything}; without the worst {len(self.excluded)} of {len(self.layers)}: "
            f"{self.chosen}",
            expected=f"{self.tolerance}, judged on the {self.judged_on}, with at least half of the weights in INT8",
            hint="calibrate with more images like those of use, try another --method, loosen it with --tolerance "
            "(none = take what comes), or stay with fp16",
        )


def most_runs(layers: int, images: int) -> int:
    """Return how many graph runs :func:`analyse` takes at most, those of the reference included."""
    return (2 + layers + math.ceil(math.log2(layers + 1))) * images


def analyse(
    layers: Sequence[Layer],
    measure: Measure,
    *,
    tolerance: Tolerance,
    enforced: bool,
    whole_set: bool,
    budget: int,
    images: Sequence[str],
    progress: Progress,
) -> Sensitivity:
    """Rank ``layers`` and choose which ones stay in float16.

    Args:
        layers: all of the graph.
        measure: see :data:`Measure`.
        tolerance: what has to hold, and what the ranking goes by.
        enforced: exclude layers until it does.
        whole_set: see :meth:`Tolerance.used`.
        budget: for the table.
        images: for the table.
        progress: shows a bar.

    Returns:
        The table; :meth:`Sensitivity.require_tolerance` says whether the tolerance could be held with at least half of
        the weights in INT8.
    """
    graphs = 0

    def used(likeness: Likeness) -> float:
        return tolerance.used(likeness, whole_set=whole_set)

    with progress.bar(len(layers) + 1, "layers", "layers") as bar:
        everything = measure(layers)
        bar.update()
        alone = []
        for layer in layers:
            alone.append((layer, measure([layer])))
            bar.update()
    graphs += 1 + len(layers)
    ranked = sorted(alone, key=lambda pair: used(pair[1]), reverse=True)
    chosen, left_out = everything, 0
    if enforced and used(everything) > 1.0:
        order = [layer for layer, _ in ranked]
        low, high = 1, _most_excluded(order)  # the fewest that do lie in low..high, if any do
        chosen, left_out = (measure(order[high:]) if high else everything), high
        graphs += 1
        while used(chosen) <= 1.0 and low < high:
            middle = (low + high) // 2
            tried = measure(order[middle:])
            graphs += 1
            if used(tried) <= 1.0:
                chosen, left_out, high = tried, middle, middle
            else:
                low = middle + 1
    effects = [
        LayerEffect(
            layer.name,
            [product.node for product in layer.products],
            layer.weights,
            used(likeness),
            likeness,
            position < left_out,
        )
        for position, (layer, likeness) in enumerate(ranked)
    ]
    judged_on = _WHOLE_SET if whole_set else _PARTS
    runs = (graphs + 1) * len(images)
    return Sensitivity(tolerance, enforced, judged_on, budget, list(images), runs, everything, chosen, effects)


def _most_excluded(order: Sequence[Layer]) -> int:
    """Return how many of the first layers may be left out: one whatever its size, but never all."""
    total, left_out, count = sum(layer.weights for layer in order), 0, 0
    for layer in order[:-1]:
        left_out += layer.weights
        if count and left_out > (1.0 - _LEAST_QUANTISED) * total:
            break
        count += 1
    return count
