"""What every selector promises at the seam: torch and the exported graph keep what the NumPy definition keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashvlm_export.errors import ConfigError
from flashvlm_export.selection import SELECTORS, get_selector, select_tokens
from flashvlm_export.selection.config import CDPrunerConfig, RandomConfig, VisionZipConfig, VisPrunerConfig

torch = pytest.importorskip("torch", reason="the selectors under test are torch modules")

# FlashVLM has tests of its own; on photographs and noise its sharpening decides by differences near float32's last bit.
COMPARED = [name for name in SELECTORS if name != "flashvlm"]
GUIDED_BY_TEXT = {"flashvlm", "flashvlm-soft", "cdpruner"}
KINDS = ("noise", "few directions", "alike")


def arrays(patches: int, kind: str = "noise", seed: int = 0) -> list[np.ndarray]:
    """Three images with 24 channels; the second has less text than the others, and its padding is not zero."""
    rng = np.random.default_rng(seed)
    features, tokens = (rng.standard_normal((3, patches, width)) for width in (16, 24))
    if kind == "few directions":
        features = 0.3 * features + rng.standard_normal((3, patches, 4)) @ rng.standard_normal((4, 16))
        tokens = 0.3 * tokens + rng.standard_normal((3, patches, 4)) @ rng.standard_normal((4, 24))
    elif kind == "alike":
        features = 0.03 * features + rng.standard_normal((3, 1, 16))
        tokens = 0.03 * tokens + rng.standard_normal((3, 1, 24))
    mask = np.ones((3, 7), bool)
    mask[1, 3:] = False
    text = np.where(mask[:, :, None], rng.standard_normal((3, 7, 24)), 9.0)
    found = [features, rng.random((3, patches)), tokens, text]
    return [*(array.astype(np.float32) for array in found), mask]


def run(name: str, given: list[np.ndarray], budget: int, config: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Kept indices and scores of the torch module; saliency is withheld where the registry says it is not needed."""
    row = get_selector(name)
    features, saliency, *rest = (torch.from_numpy(array) for array in given)
    with torch.no_grad():
        kept, scores = row.make_module(config or row.config_type())(
            features, saliency if row.needs_saliency else None, *rest, torch.tensor(budget)
        )
    assert (kept.dtype, scores.dtype) == (torch.bool, torch.float32)
    assert kept.shape == scores.shape == saliency.shape
    # nonzero lists row by row in ascending order, so this also proves that each row keeps `budget` tokens.
    return kept.nonzero()[:, 1].reshape(len(kept), budget).numpy(), scores.numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [16, 64, 225])
@pytest.mark.parametrize("name", COMPARED)
def test_torch_equals_numpy(name: str, patches: int, kind: str) -> None:
    """Budgets beyond 24 leave no direction of the tokens unexplained."""
    given, config = arrays(patches, kind), get_selector(name).config_type()
    for budget in (1, 2, 7, patches // 3, patches - 1, patches):
        np.testing.assert_array_equal(
            run(name, given, budget)[0], select_tokens(*given, budget, config), err_msg=f"budget {budget}"
        )


@pytest.mark.parametrize("name", COMPARED)
def test_torch_equals_numpy_where_everything_is_a_tie(name: str) -> None:
    """One-hot features in four directions, two levels of saliency, no text: equal keys keep their order in both."""
    given = arrays(36)
    given[0] = np.tile(np.eye(4, 16, dtype=np.float32)[np.arange(36) % 4], (3, 1, 1))
    given[1] = np.tile((np.arange(36) % 2).astype(np.float32), (3, 1))
    given[2] = np.tile(np.eye(4, 24, dtype=np.float32)[np.arange(36) % 4], (3, 1, 1))
    given[4][:] = False
    config = get_selector(name).config_type()
    for budget in (1, 2, 5, 18, 35):
        np.testing.assert_array_equal(run(name, given, budget)[0], select_tokens(*given, budget, config))


@pytest.mark.parametrize("seed", [3, 4, 6])
def test_cdpruner_tells_tokens_apart_that_are_nearly_alike(seed: int) -> None:
    """Cosines of 0.9999, as random weights give them: from plain float32 cosines, up to seven kept tokens differ."""
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((1, 1, 256)) + 0.01 * rng.standard_normal((1, 400, 256))
    text = rng.standard_normal((1, 7, 256))
    features, saliency = np.zeros((1, 400, 4), np.float32), np.zeros((1, 400), np.float32)
    given = [features, saliency, tokens.astype(np.float32), text.astype(np.float32), np.ones((1, 7), bool)]
    np.testing.assert_array_equal(run("cdpruner", given, 200)[0], select_tokens(*given, 200, CDPrunerConfig()))


@pytest.mark.parametrize("name", COMPARED)
def test_no_text_at_all(name: str) -> None:
    given = arrays(36)
    masked = [*given[:4], np.zeros_like(given[4])]
    none = [*given[:3], given[3][:, :0], given[4][:, :0]]
    config = get_selector(name).config_type()
    np.testing.assert_array_equal(select_tokens(*none, 9, config), select_tokens(*masked, 9, config))
    np.testing.assert_array_equal(run(name, masked, 9)[0], select_tokens(*masked, 9, config))


@pytest.mark.parametrize("name", COMPARED)
def test_rows_of_a_batch_are_as_if_alone(name: str) -> None:
    given = arrays(49)
    together, scores = run(name, given, 12)
    for row, length in enumerate((7, 3, 7)):
        alone = [array[row : row + 1] for array in given]
        alone[3:] = [array[:, :length] for array in alone[3:]]
        indices, score = run(name, alone, 12)
        np.testing.assert_array_equal(indices[0], together[row])
        np.testing.assert_allclose(score[0], scores[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", COMPARED)
def test_half_precision_inputs_are_selected_in_float32(name: str) -> None:
    given = arrays(100, seed=3)
    halves = [array.astype(np.float16) if array.dtype == np.float32 else array for array in given]
    widened = [array.astype(np.float32) if array.dtype == np.float16 else array for array in halves]
    expected = select_tokens(*widened, 31, get_selector(name).config_type())
    np.testing.assert_array_equal(run(name, halves, 31)[0], expected)


@pytest.mark.parametrize("name", SELECTORS)
def test_what_a_selector_looks_at(name: str) -> None:
    """Saliency where the registry says so, text where the documents do."""
    given, config = arrays(64), get_selector(name).config_type()
    kept = select_tokens(*given, 12, config)
    other = arrays(64, seed=1)
    other_saliency = select_tokens(given[0], other[1], *given[2:], 12, config)
    other_text = select_tokens(*given[:3], other[3], given[4], 12, config)
    assert np.array_equal(other_saliency, kept) != get_selector(name).needs_saliency
    assert np.array_equal(other_text, kept) != (name in GUIDED_BY_TEXT)


@pytest.mark.parametrize("name", SELECTORS)
def test_important_tokens_are_the_best_scores(name: str) -> None:
    """Parity between precisions is judged on them: the best scores, all of them kept."""
    given, config = arrays(64), get_selector(name).config_type()
    assert isinstance(config.is_stable, bool)
    for budget in (1, 2, 13, 64):
        indices, scores = run(name, given, budget)
        assert 0.0 <= scores.min() <= scores.max() <= 1.0
        important = config.important_tokens(budget)
        assert 0 <= important <= budget
        for row in range(3):
            assert np.isin(np.argsort(-scores[row], kind="stable")[:important], indices[row]).all()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("random", RandomConfig(seed=1)),
        ("vispruner", VisPrunerConfig(important_ratio=0.9)),
        ("vispruner", VisPrunerConfig(merge_step=1)),
        ("visionzip", VisionZipConfig(contextual_ratio=0.5)),
        ("visionzip", VisionZipConfig(contextual_ratio=1.0)),
        ("visionzip", VisionZipConfig(contextual_ratio=0.0)),
    ],
    ids=str,
)
def test_settings_reach_the_result(name: str, other: Any) -> None:
    given = arrays(64)
    expected = select_tokens(*given, 21, other)
    assert not np.array_equal(expected, select_tokens(*given, 21, get_selector(name).config_type()))
    np.testing.assert_array_equal(run(name, given, 21, other)[0], expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("random", {"seed": "-1"}, "'seed' is out of range"),
        ("random", {"seed": "1.5"}, "wrong type"),
        ("vispruner", {"important_ratio": 1.1}, "'important_ratio' is out of range"),
        ("vispruner", {"merge_step": 0}, "'merge_step' is out of range"),
        ("visionzip", {"contextual_ratio": -0.1}, "'contextual_ratio' is out of range"),
        ("cdpruner", {"eta": 0.5}, "none: nothing is set"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_selector(name).make_config(settings)


def test_every_selector_has_settings_of_its_own() -> None:
    """:func:`select_tokens` knows a selector by them."""
    assert len({row.config_type for row in SELECTORS.values()}) == len(SELECTORS)
    assert get_selector("cdpruner").make_config({}) == CDPrunerConfig()
    assert get_selector("random").make_config({"seed": "7"}) == RandomConfig(seed=7)


def test_the_documents_name_every_selector() -> None:
    page = (Path(__file__).parents[2] / "docs" / "selection.md").read_text(encoding="utf-8")
    assert [name for name in SELECTORS if f"| `{name}`" not in page] == []


@pytest.fixture(scope="module", params=COMPARED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """One selector's graph of 64 patches."""
    pytest.importorskip("onnxruntime", reason="running a graph needs ONNX Runtime")
    from helpers.replay import replay_graph

    name = request.param
    directory = tmp_path_factory.mktemp("graph")
    config = get_selector(name).config_type()
    return name, replay_graph(directory, config, patches=64, width=16, llm_width=24, selector=name)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_numpy_for_any_budget(exported: tuple[str, Any], kind: str) -> None:
    name, graph = exported
    given = arrays(64, kind, seed=5)
    for budget in (1, 2, 3, 9, 32, 63, 64):
        expected = select_tokens(*given, budget, get_selector(name).config_type())
        tokens, indices, scores = graph.run(*given, budget)
        np.testing.assert_array_equal(indices, expected, err_msg=f"budget {budget}")
        np.testing.assert_array_equal(tokens, np.take_along_axis(given[2], expected[:, :, None], axis=1))
        assert scores.shape == (3, 64)
