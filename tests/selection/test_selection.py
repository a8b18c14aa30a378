"""Behaviour of selection beyond the golden files: ties, text, precision, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from flashvlm_export.errors import BudgetError, ConfigError
from flashvlm_export.selection import FlashVLMConfig, get_selector, select_tokens
from flashvlm_export.selection.stages_numpy import bipartite, farthest

DIVERSITIES = ("bipartite", "farthest")


def random_arrays(batch: int = 2, patches: int = 40, text: int = 6, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((batch, patches, 16)).astype(np.float32),
        rng.random((batch, patches)).astype(np.float32),
        rng.standard_normal((batch, patches, 24)).astype(np.float32),
        rng.standard_normal((batch, text, 24)).astype(np.float32),
        np.ones((batch, text), bool),
    ]


def torch_indices(arrays: list[np.ndarray], budget: int, config: FlashVLMConfig) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the selector under test is a torch module")
    with torch.no_grad():
        kept, _ = get_selector("flashvlm").make_module(config)(
            *(torch.from_numpy(array) for array in arrays), torch.tensor(budget)
        )
    return kept.nonzero()[:, 1].reshape(len(kept), budget).numpy()


def test_bipartite_worked_by_hand() -> None:
    """One round over five tokens: evens 0, 2, 4 have odds at 0.9, 0.5, 0.7; dropping two leaves 2, then the odds."""
    cosine = np.zeros((5, 5))
    cosine[0, 1], cosine[2, 3], cosine[4, 1] = 0.9, 0.5, 0.7
    assert bipartite(cosine, np.arange(5), 3, 2).tolist() == [2, 1, 3]


def test_bipartite_drops_all_evens_when_the_step_is_larger() -> None:
    """Of four tokens one is wanted: r = 3, but there are two evens; both go, then one of the two odds."""
    cosine = np.eye(4)
    assert bipartite(cosine, np.arange(4), 1, 8).tolist() == [3]


def test_farthest_worked_by_hand() -> None:
    """On a circle, starting at 0°, the farthest is 180°, then of 90° and 270° (a tie) the lower index."""
    angles = np.deg2rad([0, 90, 180, 270, 10])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cosine = np.round(points @ points.T, 12)
    assert farthest(cosine, np.array([0]), 2).tolist() == [2, 1]


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("budget", [1, 2, 7, 20, 39, 40])
def test_torch_equals_numpy_where_everything_is_a_tie(diversity: str, budget: int) -> None:
    """One-hot features in four directions and two levels of saliency: equal keys keep their order in both."""
    arrays = random_arrays()
    arrays[0] = np.tile(np.eye(4, 16, dtype=np.float32)[np.arange(40) % 4], (2, 1, 1))
    arrays[1] = np.tile((np.arange(40) % 2).astype(np.float32), (2, 1))
    arrays[4][:] = False
    config = FlashVLMConfig(diversity=diversity)
    np.testing.assert_array_equal(torch_indices(arrays, budget, config), select_tokens(*arrays, budget, config))


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"eta": 0.0},
        {"eta": 1.0},
        {"important_ratio": 0.0},
        {"important_ratio": 1.0},
        {"important_ratio": 0.29},
        {"merge_step": 1},
        {"merge_step": 100},
        {"quantile": 0.0},
        {"quantile": 1.0},
        {"damping": 0.5, "power": 1.0, "relevance_temperature": 0.5, "sharpening_temperature": 0.5},
    ],
    ids=str,
)
def test_every_setting_means_the_same_in_torch_and_numpy(diversity: str, settings: dict[str, float]) -> None:
    arrays, config = random_arrays(), FlashVLMConfig(diversity=diversity, **settings)
    np.testing.assert_array_equal(torch_indices(arrays, 17, config), select_tokens(*arrays, 17, config))


@pytest.mark.parametrize("setting", ["eta", "power", "important_ratio", "merge_step"])
def test_settings_reach_the_result(setting: str) -> None:
    other = {"eta": 0.1, "power": 0.2, "important_ratio": 0.9, "merge_step": 1}[setting]
    arrays = random_arrays()
    changed = FlashVLMConfig(**{setting: other})
    assert not np.array_equal(select_tokens(*arrays, 9), select_tokens(*arrays, 9, changed))


def test_without_text_saliency_decides() -> None:
    arrays = random_arrays()
    masked = [*arrays[:4], np.zeros_like(arrays[4])]
    none = [*arrays[:3], arrays[3][:, :0], arrays[4][:, :0]]
    config = FlashVLMConfig(important_ratio=1.0)
    expected = np.sort(np.argsort(-arrays[1], axis=1)[:, :8], axis=1)
    np.testing.assert_array_equal(select_tokens(*masked, 8, config), expected)
    np.testing.assert_array_equal(select_tokens(*none, 8, config), expected)
    np.testing.assert_array_equal(torch_indices(masked, 8, config), expected)


def test_text_guides_the_choice() -> None:
    """The patch whose visual token is the question's embedding is kept at a budget that saliency alone denies it."""
    arrays = random_arrays(batch=1)
    patch = 11
    arrays[2][0, patch] = arrays[3][0, 2]
    arrays[1][0] = np.linspace(1.0, 0.5, 40, dtype=np.float32)
    assert patch in select_tokens(*arrays, 2)[0]
    assert patch not in select_tokens(*arrays, 2, FlashVLMConfig(eta=0.0))[0]


def test_half_precision_inputs_are_selected_in_float32() -> None:
    arrays = random_arrays(patches=200, seed=3)
    halves = [array.astype(np.float16) if array.dtype == np.float32 else array for array in arrays]
    widened = [array.astype(np.float32) if array.dtype == np.float16 else array for array in halves]
    expected = select_tokens(*widened, 60, FlashVLMConfig(diversity="farthest"))
    np.testing.assert_array_equal(torch_indices(halves, 60, FlashVLMConfig(diversity="farthest")), expected)


@pytest.mark.parametrize("budget", [0, -1, 41, 2.0, "8", None, True])
def test_budget_is_refused(budget: object) -> None:
    with pytest.raises(BudgetError, match="expected"):
        select_tokens(*random_arrays(), budget)


def test_arrays_that_do_not_fit_are_named() -> None:
    arrays = random_arrays()
    with pytest.raises(ConfigError, match="'saliency' does not fit"):
        select_tokens(arrays[0], arrays[1][:, :-1], *arrays[2:], 4)
    with pytest.raises(ConfigError, match="'text_mask' has the wrong dtype"):
        select_tokens(*arrays[:4], arrays[4].astype(np.int64), 4)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="eta"):
        FlashVLMConfig(eta=1.5)
    with pytest.raises(ConfigError, match="diversity"):
        FlashVLMConfig(diversity="clustering")
    with pytest.raises(ConfigError, match="no such setting"):
        get_selector("flashvlm").make_config({"etta": 0.5})
    with pytest.raises(ConfigError, match="wrong type"):
        get_selector("flashvlm").make_config({"merge_step": "2.5"})
    assert get_selector("flashvlm").make_config({"eta": "0.4", "merge_step": "2"}) == FlashVLMConfig(
        eta=0.4, merge_step=2
    )
    with pytest.raises(ConfigError, match="unknown selector"):
        get_selector("best")
    with pytest.raises(ConfigError, match="no selector has settings of this type"):
        select_tokens(*random_arrays(), 4, {"eta": 0.5})
