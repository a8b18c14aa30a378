"""Sampling against transformers' own logits processors, and the settings' limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracle is transformers' logits processors")

from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flashvlm_export.errors import ConfigError, LLMError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.llm.sampling import Sampler, token_probabilities

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1000},
]


def reference_probabilities(logits: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    scores = TemperatureLogitsWarper(settings["temperature"])(None, scores)
    if "top_k" in settings:
        scores = TopKLogitsWarper(settings["top_k"])(None, scores)
    if "top_p" in settings:
        scores = TopPLogitsWarper(settings["top_p"])(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_probabilities_are_those_of_transformers(settings: dict[str, Any], dtype: Any) -> None:
    random = np.random.default_rng(0)
    for scale in (0.5, 3.0, 20.0):
        logits = (random.standard_normal(300) * scale).astype(dtype)
        if dtype == np.float16:  # coarse numbers repeat; whose turn it is at top-p's edge is not defined there
            logits = np.unique(logits)
            random.shuffle(logits)
        actual = token_probabilities(logits, SamplingParams(**settings))
        np.testing.assert_allclose(actual, reference_probabilities(logits, settings), rtol=1e-9, atol=1e-15)


def test_tokens_as_likely_as_the_kth_stay_in() -> None:
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    settings = {"temperature": 1.0, "top_k": 2}
    actual = token_probabilities(logits, SamplingParams(**settings))
    np.testing.assert_allclose(actual, reference_probabilities(logits, settings), rtol=1e-9)
    assert np.count_nonzero(actual) == 3


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_draws_follow_the_probabilities(settings: dict[str, Any]) -> None:
    logits = np.random.default_rng(3).standard_normal(40).astype(np.float32) * 2
    expected = reference_probabilities(logits, settings)
    draws = 20_000
    sample = Sampler(SamplingParams(**settings, seed=11))
    counts = np.bincount([sample(logits) for _ in range(draws)], minlength=40)
    assert not counts[expected == 0].any(), "a token that was filtered out was drawn"
    # Each count is binomial; five standard deviations hold for 40 tokens with a chance of 1 in 40 000.
    assert (np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)) + 1e-6).all()


def test_greedy_is_argmax_and_needs_no_seed() -> None:
    random = np.random.default_rng(0)
    sample = Sampler(SamplingParams())
    for _ in range(20):
        logits = random.standard_normal(100).astype(np.float32)
        assert sample(logits) == max(range(100), key=lambda token: logits[token])


def test_seeds() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sample = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sample(logits) for _ in range(16)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)
    assert len(set(draws(5))) > 10, "one seed gives a sequence, not one number"


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = np.array([-3e38, 1.0, 3e38, 3e37], np.float32)
    assert Sampler(SamplingParams(temperature=temperature, seed=0))(logits) == 2


def test_minus_infinity_rules_a_token_out() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    sample = Sampler(SamplingParams(temperature=1.0, seed=0))
    assert {sample(logits) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_and_not_a_token(bad: float, temperature: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float16)
    with pytest.raises(LLMError, match="half precision"):
        Sampler(SamplingParams(temperature=temperature))(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", "x"),
    ],
)
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.exit_code == 2
    assert caught.value.expected
