"""Watching a stream of activations and choosing the range that INT8 has to cover.

Histograms and the two searches over them are ONNX Runtime's ``HistogramCollector``. Its calibrators around it are not
used: they keep the outputs of all images at once, and cannot stop and resume.
"""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flashvlm_export.errors import CalibrationError, ConfigError
from flashvlm_export.specs import Array

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")

# Bins at the start; ONNX Runtime adds more when a later image reaches further. Entropy tries every threshold from
# an eighth of the range up, in pure Python: with more bins the search takes seconds for each tensor.
_ENTROPY_BINS, _ENTROPY_LEVELS = 1024, 128
_PERCENTILE_BINS = 2048


@dataclass(frozen=True)
class Range:
    """What was seen of one tensor.

    Attributes:
        lowest: smallest value.
        highest: largest value.
        amax: magnitude that becomes level 127; what lies beyond is clipped.
    """

    lowest: float
    highest: float
    amax: float


class Observer(ABC):
    """Keeps what one calibration method has to know, tensor by tensor."""

    def observe(self, name: str, values: Array) -> None:
        """Take in the values of tensor ``name`` for one more image.

        Raises:
            CalibrationError: if a value is infinite or no number.
        """
        # A float16 histogram cannot count: its edges would be rounded onto each other.
        values = np.asarray(values, np.float32).ravel()
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"activations of '{name}' are not finite",
                received=f"{np.count_nonzero(~np.isfinite(values))} of {values.size} values",
                expected="finite numbers in the fp16 graph",
                hint="float16 overflows in this model: INT8 needs a graph whose float16 form works",
            )
        self._take(name, values)

    @abstractmethod
    def ranges(self) -> dict[str, Range]:
        """Return the range of every tensor seen."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Return everything that :meth:`restore` needs."""

    @abstractmethod
    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from where :meth:`state` was taken."""

    @abstractmethod
    def _take(self, name: str, values: Array) -> None:
        """Take in finite float32 values ``[n]``."""


class MinMaxObserver(Observer):
    """The largest magnitude ever seen: nothing is clipped, an outlier makes every step coarser."""

    def __init__(self) -> None:
        self._extremes: dict[str, tuple[float, float]] = {}

    def _take(self, name: str, values: Array) -> None:
        low, high = self._extremes.get(name, (np.inf, -np.inf))
        self._extremes[name] = min(low, float(values.min())), max(high, float(values.max()))

    def ranges(self) -> dict[str, Range]:
        """Return the range of every tensor seen."""
        return {name: Range(low, high, max(-low, high)) for name, (low, high) in self._extremes.items()}

    def state(self) -> dict[str, Array]:
        """Return the extremes."""
        return {name: np.array(pair, np.float64) for name, pair in self._extremes.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over the extremes."""
        self._extremes = {name: (float(pair[0]), float(pair[1])) for name, pair in state.items()}


class HistogramObserver(Observer):
    """A histogram per tensor, and a threshold that may clip the rarest values.

    Args:
        method: ``entropy`` (least Kullback-Leibler divergence between the values and their 128-level form) or
            ``percentile``.
        percentile: share of magnitudes, in percent, that is not clipped.
    """

    def __init__(self, method: Literal["entropy", "percentile"], percentile: float) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        self._collector: Any = HistogramCollector(
            method=method,
            symmetric=method == "percentile",
            num_bins=_ENTROPY_BINS if method == "entropy" else _PERCENTILE_BINS,
            num_quantized_bins=_ENTROPY_LEVELS,
            percentile=percentile,
            scenario="same",
        )

    def _take(self, name: str, values: Array) -> None:
        with _quiet():
            self._collector.collect({name: values})

    def ranges(self) -> dict[str, Range]:
        """Return the range of every tensor seen; for entropy about 0.1 s each."""
        seen = self._collector.histogram_dict
        # The bins where nothing fell make 0 / 0 and log 0 on the way, as ONNX Runtime intends.
        with _quiet(), np.errstate(divide="ignore", invalid="ignore"):
            chosen = self._collector.compute_collection_result()
        return {
            name: Range(float(parts[2]), float(parts[3]), max(-float(chosen[name][0]), float(chosen[name][1])))
            for name, parts in seen.items()
        }

    def state(self) -> dict[str, Array]:
        """Return counts, edges and extremes, under ``NUMBER/TENSOR``."""
        return {
            f"{number}/{name}": np.asarray(part)
            for name, parts in self._collector.histogram_dict.items()
            for number, part in enumerate(parts)
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over counts, edges and extremes."""
        parts: dict[str, dict[int, Any]] = {}
        for key, value in state.items():
            number, _, name = key.partition("/")
            # Scalars have to be NumPy's own again, with their dtype: ONNX Runtime looks at it.
            parts.setdefault(name, {})[int(number)] = value[()] if value.ndim == 0 else value
        self._collector.histogram_dict = {name: tuple(found[n] for n in sorted(found)) for name, found in parts.items()}


def make_observer(method: Method, percentile: float) -> Observer:
    """Return a new observer.

    Raises:
        ConfigError: if there is no such method, or ``percentile`` is not in 50..100.
    """
    if method not in METHODS:
        raise ConfigError("unknown calibration method", received=repr(method), expected=f"one of {', '.join(METHODS)}")
    if not 50.0 <= percentile <= 100.0:
        raise ConfigError("the percentile is out of range", received=percentile, expected="50 to 100")
    return MinMaxObserver() if method == "minmax" else HistogramObserver(method, percentile)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """ONNX Runtime prints what it does with ``print``, into a stream where JSON may be expected."""
    return contextlib.redirect_stdout(io.StringIO())
