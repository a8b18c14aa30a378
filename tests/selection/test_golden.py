"""Golden indices of the authors' released implementation, through NumPy, torch and the exported graph."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from flashvlm_export.selection import FlashVLMConfig, get_selector, select_tokens

torch = pytest.importorskip("torch", reason="the golden projector and the selectors under test are torch modules")

from helpers.replay import Replay, replay_graph

DATA = Path(__file__).parent.parent / "data"
FILES = ("llava_a", "llava_b", "llava_small")
DIVERSITIES = ("bipartite", "farthest")


@dataclass(frozen=True)
class Golden:
    """Inputs of one golden file and, per budget, the expected indices and tokens."""

    arrays: tuple[np.ndarray, ...]  # features, saliency, tokens, text_embeds, text_mask
    indices: dict[int, np.ndarray]
    tokens: dict[int, np.ndarray]


def load(name: str) -> Golden:
    with np.load(DATA / f"{name}.npz") as data:
        features = torch.from_numpy(data["patch_features"])
        linear = torch.nn.functional.linear
        hidden = linear(features, torch.from_numpy(data["proj_w1"]), torch.from_numpy(data["proj_b1"]))
        hidden = torch.nn.functional.gelu(hidden)
        tokens = linear(hidden, torch.from_numpy(data["proj_w2"]), torch.from_numpy(data["proj_b2"])).numpy()
        budgets = [int(budget) for budget in data["budgets"]]
        return Golden(
            (
                data["patch_features"],
                data["cls_attention"].mean(axis=1),
                tokens,
                data["text_embeds"],
                data["text_mask"],
            ),
            {budget: data[f"indices_{budget}"] for budget in budgets},
            {budget: data[f"tokens_{budget}"] for budget in budgets},
        )


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load(request.param)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Replay]:
    """Exported graphs by diversity and number of patches; the two large golden files share one."""
    directory = tmp_path_factory.mktemp("golden")
    return {
        (diversity, patches): replay_graph(
            directory, FlashVLMConfig(diversity=diversity), patches=patches, width=width, llm_width=llm_width
        )
        for diversity in DIVERSITIES
        for patches, width, llm_width in ((576, 64, 96), (64, 32, 48))
    }


def test_numpy_returns_every_golden_index(golden: Golden) -> None:
    for budget, expected in golden.indices.items():
        np.testing.assert_array_equal(select_tokens(*golden.arrays, budget), expected)


def test_torch_returns_every_golden_index(golden: Golden) -> None:
    module = get_selector("flashvlm").make_module(FlashVLMConfig())
    tensors = [torch.from_numpy(array) for array in golden.arrays]
    for budget, expected in golden.indices.items():
        with torch.no_grad():
            kept, _ = module(*tensors, torch.tensor(budget))
        # nonzero lists row by row in ascending order, so this also proves that each row keeps `budget` tokens.
        np.testing.assert_array_equal(kept.nonzero()[:, 1].reshape(len(kept), budget).numpy(), expected)


def test_graph_returns_every_golden_index_and_token(golden: Golden, graphs: dict[tuple[str, int], Replay]) -> None:
    graph = graphs["bipartite", golden.arrays[0].shape[1]]
    for budget, expected in golden.indices.items():
        tokens, indices, _ = graph.run(*golden.arrays, budget)
        np.testing.assert_array_equal(indices, expected)
        # The golden tokens come from another build of the same two matrix products.
        np.testing.assert_allclose(tokens, golden.tokens[budget], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("budget", [1, 2, 3, 31, 32, 128, 200, 575, 576])
def test_graph_equals_numpy_for_any_budget(diversity: str, budget: int, graphs: dict[tuple[str, int], Replay]) -> None:
    arrays = load("llava_a").arrays
    expected = select_tokens(*arrays, budget, FlashVLMConfig(diversity=diversity))
    tokens, indices, _ = graphs[diversity, 576].run(*arrays, budget)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(tokens, np.take_along_axis(arrays[2], expected[:, :, None], axis=1))


@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_batch_of_three_with_padded_text(diversity: str, graphs: dict[tuple[str, int], Replay]) -> None:
    """Three images with 35, fewer and 60 text tokens: each row as if it were alone, padding without influence."""
    a, b = load("llava_a"), load("llava_b")
    longest = b.arrays[3].shape[1]
    padding = ((0, 0), (0, longest - a.arrays[3].shape[1]))
    text = np.pad(a.arrays[3], (*padding, (0, 0)), constant_values=9.0)
    mask = np.pad(a.arrays[4], padding)
    batch = [np.concatenate(pair) for pair in zip((*a.arrays[:3], text, mask), b.arrays, strict=True)]
    graph = graphs[diversity, 576]
    for budget in (2, 33, 129):
        _, together, _ = graph.run(*batch, budget)
        expected = select_tokens(*batch, budget, FlashVLMConfig(diversity=diversity))
        np.testing.assert_array_equal(together, expected)
        for row in range(3):
            length = int(batch[4][row].sum())
            alone = [array[row : row + 1] for array in batch[:3]]
            text_alone = [array[row : row + 1, :length] for array in batch[3:]]
            _, indices, _ = graph.run(*alone, *text_alone, budget)
            np.testing.assert_array_equal(indices[0], together[row])


@pytest.fixture(scope="module")
def qwen() -> Golden:
    """The variant for Qwen2.5-VL: merged tokens are features too, text counts by its length."""
    with np.load(DATA / "qwen_a.npz") as data:
        tokens, text = data["image_tokens"][None], data["text_embeds"][None]
        mask = np.ones(text.shape[:2], np.bool_)
        indices = {int(budget): data[f"indices_{budget}"][None] for budget in data["budgets"]}
        arrays = (tokens, data["attention_received"][None], tokens, text, mask)
        return Golden(arrays, indices, {})


def test_numpy_and_torch_return_every_golden_index_of_qwen(qwen: Golden) -> None:
    config = FlashVLMConfig(weigh_text=True)
    module = get_selector("flashvlm").make_module(config)
    tensors = [torch.from_numpy(array) for array in qwen.arrays]
    for budget, expected in qwen.indices.items():
        np.testing.assert_array_equal(select_tokens(*qwen.arrays, budget, config), expected)
        with torch.no_grad():
            kept, _ = module(*tensors, torch.tensor(budget))
        np.testing.assert_array_equal(kept.nonzero()[:, 1].numpy(), expected[0])
    without = select_tokens(*qwen.arrays, 98)
    assert not np.array_equal(without, qwen.indices[98])


@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_a_graph_of_any_size_returns_every_golden_index_of_qwen(qwen: Golden, diversity: str, tmp_path: Path) -> None:
    """One graph for 4 to 391 visual tokens: golden at its largest, the definition at others, with padded text."""
    config = FlashVLMConfig(diversity=diversity, weigh_text=True)
    graph = replay_graph(tmp_path, config, patches=391, width=64, llm_width=64, any_size=True)
    if diversity == "bipartite":
        for budget, expected in qwen.indices.items():
            np.testing.assert_array_equal(graph.run(*qwen.arrays, budget)[1], expected)
    features, saliency, tokens, text, mask = (np.concatenate([array, array[:, ::-1]]) for array in qwen.arrays)
    mask = mask.copy()
    mask[1, 11:] = False
    for count, budget in ((4, 1), (4, 4), (17, 5), (100, 33), (256, 255), (201, 64)):
        arrays = (features[:, :count], saliency[:, :count], tokens[:, :count], text, mask)
        expected = select_tokens(*arrays, budget, config)
        np.testing.assert_array_equal(graph.run(*arrays, budget)[1], expected, err_msg=f"{budget} of {count}")


def test_the_two_diversity_steps_differ() -> None:
    arrays = load("llava_a").arrays
    assert not np.array_equal(
        select_tokens(*arrays, 64), select_tokens(*arrays, 64, FlashVLMConfig(diversity="farthest"))
    )


@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_a_graph_of_any_size_compiles_with_tensorrt_rtx(diversity: str, tmp_path: Path) -> None:
    """Loops whose rows have an input's length, sorted in them or not."""
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the package tensorrt-rtx-cu12")
    from flashvlm_export.export.engine_from_onnx import engine_from_onnx

    config = FlashVLMConfig(diversity=diversity, weigh_text=True)
    graph = replay_graph(tmp_path, config, patches=391, width=64, llm_width=64, any_size=True)
    engine = io.BytesIO()
    engine_from_onnx(graph.file, graph.spec, "tensorrt-rtx", engine, profiles=[graph.spec.dims], capabilities=[(8, 6)])
    assert engine.tell() > 100_000


@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_graph_compiles_with_tensorrt_rtx(diversity: str, graphs: dict[tuple[str, int], Replay]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs the package tensorrt-rtx-cu12")
    from flashvlm_export.export.engine_from_onnx import engine_from_onnx

    graph = graphs[diversity, 576]
    engine = io.BytesIO()
    engine_from_onnx(graph.file, graph.spec, "tensorrt-rtx", engine, profiles=[graph.spec.dims], capabilities=[(8, 6)])
    assert engine.tell() > 100_000
