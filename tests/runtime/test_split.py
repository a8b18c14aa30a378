"""Encoder and selectors apart: the fused graph's very numbers, each image looked at once, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import BudgetError, ConfigError, ImageError, SessionError, UsageError
from flashvlm_export.runtime.graph_inputs import PreparedImage
from flashvlm_export.runtime.image_cache import ImageCache
from flashvlm_export.runtime.images import content_key, load_image
from flashvlm_export.runtime.layout import one_picture
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Pruning, Request
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.runtime.sessions.split import EncodedImage, SplitSession
from flashvlm_export.selection import get_selector, select_tokens
from flashvlm_export.specs import Array, Precision


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def pipeline(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, selectors=["flashvlm", "divprune"], llm=None) as opened:
        yield opened


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), np.uint8))


def feeds_for(bundle: Bundle, precision: Precision, budget: int, batch: int = 3, seed: int = 0) -> dict[str, Array]:
    dims, random = bundle.manifest.dims, np.random.default_rng(seed)
    mask = np.ones((batch, 6), np.bool_)
    mask[-1, 3:] = False
    text = random.standard_normal((batch, 6, dims.llm_width)) * mask[:, :, None]
    return {
        "pixel_values": random.standard_normal((batch, 3, dims.image_size, dims.image_size)).astype(np.float32),
        "text_embeds": text.astype(precision.float_dtype),
        "text_mask": mask,
        "budget": np.array(budget, np.int64),
    }


def prepared(bundle: Bundle, pixels: Array) -> list[PreparedImage]:
    return [PreparedImage({"pixel_values": rows[None]}, one_picture(bundle.manifest.dims.grid)) for rows in pixels]


@pytest.mark.parametrize("budget", [1, 5, 16])
def test_the_halves_give_the_fused_graphs_bits(bundle: Bundle, budget: int) -> None:
    feeds = feeds_for(bundle, Precision.FP32, budget)
    fused = OnnxRuntimeSession(bundle.graph_file(Precision.FP32), bundle.manifest.graphs["fp32"].spec)
    with fused, SplitSession(bundle, Precision.FP32) as split:
        want, have = fused.run(feeds), split.run(feeds)
    for name in ("tokens", "indices", "scores"):
        np.testing.assert_array_equal(getattr(have, name), getattr(want, name), err_msg=name)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("selector", ["flashvlm", "divprune", "cdpruner"])
def test_each_selector_keeps_what_its_definition_keeps(bundle: Bundle, precision: Precision, selector: str) -> None:
    feeds = feeds_for(bundle, precision, 6, seed=3)
    with SplitSession(bundle, precision, [selector]) as split:
        images = split.encode(prepared(bundle, feeds["pixel_values"]))
        kept = split.select(images, feeds["text_embeds"], feeds["text_mask"], 6)
    features, saliency, tokens = (
        np.stack([getattr(image, name) for image in images])
        for name in ("patch_features", "saliency", "projected_tokens")
    )
    config = get_selector(selector).make_config(bundle.split_graphs(precision).selectors[selector].config)
    expected = select_tokens(features, saliency, tokens, feeds["text_embeds"], feeds["text_mask"], 6, config)
    np.testing.assert_array_equal(kept.indices, expected)
    np.testing.assert_array_equal(kept.tokens, np.take_along_axis(tokens, expected[:, :, None], axis=1))


def test_prompts_are_those_of_the_fused_graph(bundle: Bundle, pipeline: Pipeline) -> None:
    requests = [Request([picture(0), picture(1)], "What is it?"), Request([picture(0)], "Where?")]
    with Pipeline.open(bundle, llm=None) as fused:
        want = fused.encode(requests, budget=5)
    for _ in range(2):  # encoded, then remembered
        have = pipeline.encode(requests, budget=5)
        for one, other in zip(want, have, strict=True):
            np.testing.assert_array_equal(one.inputs_embeds, other.inputs_embeds)
            np.testing.assert_array_equal(one.indices, other.indices)


def test_budgets_and_selectors_share_the_encoder(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    encode = SplitSession.encode
    monkeypatch.setattr(
        SplitSession, "encode", lambda self, images: batches.append(len(images)) or encode(self, images)
    )
    prunings = [Pruning(4), Pruning(9), Pruning(4, selector="divprune"), Pruning(4)]
    asked = [(Request([picture(seed)], "What is it?"), pruning) for seed, pruning in enumerate(prunings)]
    together = pipeline.encode_each(asked)
    assert batches == [4]
    pipeline.images.clear()
    for prompt, one in zip(together, asked, strict=True):
        alone = pipeline.encode_each([one])[0]
        np.testing.assert_array_equal(prompt.indices, alone.indices)
        # The encoder's products run in another order for four images: a few roundings of float32.
        np.testing.assert_allclose(prompt.inputs_embeds, alone.inputs_embeds, rtol=0, atol=1e-5)


def test_an_image_is_encoded_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batches = []
    encode = SplitSession.encode

    def counting(self: SplitSession, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        batches.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(SplitSession, "encode", counting)
    file = tmp_path / "picture.png"
    picture(7).save(file)
    pipeline.encode([Request([file, file.read_bytes()], "What is it?"), Request([file], "Where?")], budget=4)
    again = pipeline.encode([Request([file], "How many?")], budget=9, selector="divprune")[0]
    assert batches == [1]  # a path and its bytes are one image
    assert "encode" not in again.stage_ms
    assert (pipeline.images.stats.hits, pipeline.images.stats.images) == (1, 1)
    picture(8).save(file)
    pipeline.encode([Request([file], "How many?")])
    assert batches == [1, 1]  # the file has changed


def test_the_selector_is_chosen_by_request(pipeline: Pipeline) -> None:
    request = [Request([picture(2)], "What is it?")]
    first, other = (pipeline.encode(request, budget=6, selector=name)[0] for name in (None, "divprune"))
    own = pipeline.encode(request, budget=6, selector="flashvlm")[0]
    np.testing.assert_array_equal(first.indices[0], own.indices[0])
    assert first.indices[0].tolist() != other.indices[0].tolist()


def encoded(size_bytes: int) -> EncodedImage:
    arrays = (np.zeros(size, np.int8) for size in (size_bytes - 2, 1, 1))
    return EncodedImage(*arrays, one_picture((1, 1)))


def test_the_cache_drops_what_was_not_used_for_longest() -> None:
    cache = ImageCache(100)
    for key in ("a", "b"):
        cache.put(key, encoded(40))
    assert cache.get("a") is not None
    cache.put("c", encoded(40))
    assert [cache.get(key) is not None for key in ("a", "b", "c")] == [True, False, True]
    cache.put("a", encoded(90))
    assert [cache.get(key) is not None for key in ("a", "c")] == [True, False]
    assert (cache.stats.images, cache.stats.size_bytes) == (1, 90)


def test_an_image_beyond_the_cache_is_not_kept() -> None:
    cache = ImageCache(100)
    cache.put("a", encoded(40))
    cache.put("b", encoded(101))
    assert [cache.get(key) is not None for key in ("a", "b")] == [True, False]
    for size in (-1, 1 << 60):
        with pytest.raises(ConfigError, match="does not fit into memory"):
            ImageCache(size)


def test_keys_tell_images_apart(tmp_path: Path) -> None:
    image = picture()
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # rotated on loading
    painted = Image.new("P", (8, 8), 1)
    painted.putpalette([0, 0, 0, 250, 0, 0])
    repainted = painted.copy()
    repainted.putpalette([0, 0, 0, 0, 250, 0])
    pixels = np.asarray(image)
    file = tmp_path / "a.png"
    image.save(file)
    sources: list[Any] = [
        image,
        turned,
        image.convert("L"),
        painted,
        repainted,
        pixels,
        pixels[::-1],
        pixels.reshape(90, 70, 3),
        file,
    ]
    keys = [content_key(source) for source in sources]
    assert len(set(keys)) == len(keys)
    assert keys == [content_key(source) for source in sources]
    assert content_key(str(file)) == content_key(file.read_bytes()) == keys[-1]
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:2000])
    with (
        Image.open(tmp_path / "cut.png") as cut,
        pytest.raises(ImageError, match="image"),
    ):
        content_key(cut)
    for bad in (tmp_path / "none.png", "https://example.com/a.png", "data:image/png;base64,?", 7):
        with pytest.raises(ImageError) as wrong:
            content_key(bad)  # type: ignore[arg-type]  # what no type checker lets through
        with pytest.raises(ImageError) as expected:
            load_image(bad)  # type: ignore[arg-type]  # what no type checker lets through
        assert str(wrong.value) == str(expected.value)


def test_bad_input_is_refused(bundle: Bundle, pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="no such selector") as wrong:
        SplitSession(bundle, Precision.FP32, ["uniform"])
    assert "--split divprune,cdpruner,uniform" in str(wrong.value)
    with pytest.raises(ConfigError, match="no such selector") as wrong:
        SplitSession(bundle, Precision.FP32, ["unifrom"])
    assert "--split" not in str(wrong.value)
    with pytest.raises(ConfigError, match="as graphs of their own") as wrong:
        bundle.split_graphs(Precision.INT8)
    assert "--precision fp32" in str(wrong.value)  # nothing that would replace the bundle
    whole = Bundle(bundle.path, replace(bundle.manifest, split={}))
    with pytest.raises(ConfigError, match="as graphs of their own") as wrong:
        Pipeline.open(whole, selectors=[])
    assert "--split" in str(wrong.value)
    with pytest.raises(UsageError, match="an engine is built of the fused graph"):
        Pipeline.open(bundle, selectors=[], engine="rtx-30")
    with pytest.raises(ConfigError, match="not loaded"):
        pipeline.encode([Request([picture(99)], "What?")], selector="cdpruner")
    assert pipeline.images.stats.misses == 0  # refused before anything was looked at
    with pytest.raises(BudgetError):
        pipeline.encode([Request([picture()], "What?")], budget=17)
    with Pipeline.open(whole, llm=None) as fused, pytest.raises(UsageError, match="has its selector inside"):
        fused.encode([Request([picture()], "What?")], selector="flashvlm")
    feeds = feeds_for(bundle, Precision.FP32, 4)
    session = SplitSession(bundle, Precision.FP32)
    with pytest.raises(SessionError, match="not open"):
        session.encode(prepared(bundle, feeds["pixel_values"]))
    with session, pytest.raises(SessionError, match="wrong shape"):
        session.encode(prepared(bundle, feeds["pixel_values"][:, :2]))
