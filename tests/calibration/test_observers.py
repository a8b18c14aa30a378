"""Ranges from streams of values, against NumPy on all values at once."""

from __future__ import annotations

import numpy as np
import pytest

from flashvlm_export.calibration.observers import METHODS, Method, make_observer
from flashvlm_export.errors import CalibrationError, ConfigError
from flashvlm_export.specs import Array


def stream(seed: int = 0) -> list[Array]:
    """Float16 activations of four images, each reaching a little further than the one before."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((5, 400)) * (1 + 0.3 * image) + 0.5).astype(np.float16) for image in range(4)]


def test_minmax_is_the_largest_magnitude() -> None:
    observer = make_observer("minmax", 99.0)
    for image in stream():
        observer.observe("x", image)
        observer.observe("y", -3 * np.abs(image))
    everything = np.concatenate(stream()).astype(np.float64)
    found = observer.ranges()
    assert (found["x"].lowest, found["x"].highest) == (everything.min(), everything.max())
    assert found["x"].amax == np.abs(everything).max()
    assert found["y"].amax == pytest.approx(3 * np.abs(everything).max(), rel=2e-3)
    assert found["y"].highest <= 0.0


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_percentile_leaves_out_the_largest_magnitudes(percentile: float) -> None:
    observer = make_observer("percentile", percentile)
    for image in stream():
        observer.observe("x", image)
    magnitudes = np.abs(np.concatenate(stream()).astype(np.float64))
    # One bin of 2048 holds at most some thousandth of the values.
    assert 100 * np.mean(magnitudes <= observer.ranges()["x"].amax) == pytest.approx(percentile, abs=0.15)


def test_entropy_clips_an_outlier_and_minmax_does_not() -> None:
    values = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
    values[7] = 40.0
    amax = {}
    for method in METHODS:
        observer = make_observer(method, 99.9)
        observer.observe("x", values)
        amax[method] = observer.ranges()["x"].amax
    assert amax["minmax"] == 40.0
    assert 3.0 < amax["entropy"] < 15.0
    assert amax["percentile"] == pytest.approx(np.percentile(np.abs(values), 99.9), abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_observer_goes_on_as_if_nothing_had_happened(method: Method) -> None:
    whole, first, second = (make_observer(method, 99.0) for _ in range(3))
    images = stream()
    for image in images:
        whole.observe("a/b", image)
    for image in images[:2]:
        first.observe("a/b", image)
    second.restore({name: np.array(array) for name, array in first.state().items()})
    for image in images[2:]:
        second.observe("a/b", image)
    assert second.ranges() == whole.ranges()
    assert first.ranges() != whole.ranges()


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_a_range(method: Method) -> None:
    observer = make_observer(method, 99.0)
    observer.observe("x", np.zeros((2, 100), np.float16))
    assert 0.0 <= observer.ranges()["x"].amax < 0.01


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(CalibrationError, match="'x' are not finite") as caught:
        make_observer("minmax", 99.0).observe("x", np.array([1.0, value], np.float16))
    assert "1 of 2" in str(caught.value)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    observer = make_observer("entropy", 99.0)
    observer.observe("x", stream()[0])
    observer.ranges()
    assert capsys.readouterr() == ("", "")


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="percentile"):
        make_observer("percentile", 20.0)
    with pytest.raises(ConfigError, match="minmax, entropy, percentile"):
        make_observer("average", 99.0)
