"""LLaVA-NeXT: overview and tiles against transformers' own processor and model, which see the photographs first."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.asking import NEW_TOKENS, PAIRS, greedy, photograph, picture
from transformers import AutoProcessor

from flashvlm_export.errors import CheckpointError, ConfigError
from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint
from flashvlm_export.export.reference import LlavaNextReference, make_reference
from flashvlm_export.models import adapter_class
from flashvlm_export.runtime.heatmap import draw_selection
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.prompt_file import read_prompt, write_prompt
from flashvlm_export.runtime.request import Request
from flashvlm_export.selection import get_selector

SIZES = [
    (640, 480),
    (480, 640),
    (500, 500),
    (1600, 400),
    (300, 1200),
    (1, 1),
    (57, 56),
    (2000, 3),
    (3, 2000),
    (37, 211),
]


@pytest.fixture(scope="module")
def checkpoint(next_checkpoint: Path) -> Path:
    return next_checkpoint


@pytest.fixture(scope="module")
def bundle(next_bundle: Path) -> Path:
    return next_bundle


@pytest.fixture(scope="module", params=["fused", "split"])
def pipeline(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, precision="fp32", selectors=[] if request.param == "split" else None) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlavaNextReference:
    found = make_reference(checkpoint)
    assert isinstance(found, LlavaNextReference)
    return found


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint)


def ask_transformers(reference: LlavaNextReference, processor: Any, images: list[Any], text: str) -> list[int]:
    """Return the answer of transformers to a prompt, from picture and text to tokens without this package."""
    given = processor(images=images, text=text, return_tensors="pt")
    with torch.no_grad():
        output = reference.model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids: list[int] = output[0, given["input_ids"].shape[1] :].tolist()
    return ids[:-1] if ids[-1] == processor.tokenizer.eos_token_id else ids


@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_tokens_are_those_of_the_processor(
    size: tuple[int, int], pipeline: Pipeline, processor: Any
) -> None:
    image = picture(size)
    given = processor(images=[image], text="<image>", return_tensors="np")
    prepared = pipeline.inputs.prepare(image)
    np.testing.assert_array_equal(prepared.inputs["pixel_values"], given["pixel_values"][0])
    placeholders = int((given["input_ids"] == pipeline.bundle.manifest.prompt.image_token_id).sum())
    assert prepared.layout.length == placeholders


@pytest.mark.parametrize("size", SIZES)
def test_layout_and_encoder_are_those_of_transformers(
    size: tuple[int, int], bundle: Path, reference: LlavaNextReference
) -> None:
    """Features, saliency and tokens of the encoder alone, in the order in which transformers packs them."""
    with Pipeline.open(bundle, precision="fp32", selectors=[], llm=None) as split:
        (encoded,) = split.session.encode([split.inputs.prepare(picture(size))])
    have = (encoded.patch_features, encoded.saliency, encoded.projected_tokens)
    want = reference.encode(split.inputs.prepare(picture(size)).inputs["pixel_values"], size)
    for array, expected in zip(have, want, strict=True):
        # float32 sums in another order; as in the checks of an export.
        np.testing.assert_allclose(array, expected[0], rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize(("name", "question"), PAIRS)
def test_unpruned_answer_is_that_of_transformers(
    name: str, question: str, positions: Any, pipeline: Pipeline, reference: LlavaNextReference, processor: Any
) -> None:
    image = load_image(photograph(name))
    prompt = pipeline.encode([Request([image], question)], budget=pipeline.visual_tokens, positions=positions)[0]
    np.testing.assert_array_equal(prompt.positions, np.arange(len(prompt.inputs_embeds)))
    expected = ask_transformers(reference, processor, [image], prompt.prompt.text)
    assert expected
    assert greedy(pipeline, prompt) == expected


@pytest.mark.parametrize("size", SIZES)
def test_unpruned_answer_about_an_image_of_any_shape(
    size: tuple[int, int], pipeline: Pipeline, reference: LlavaNextReference, processor: Any
) -> None:
    prompt = pipeline.encode([Request([picture(size)], "What is this?")], budget=pipeline.visual_tokens)[0]
    assert len(prompt.images[0].rows) == prompt.images[0].layout.length
    assert greedy(pipeline, prompt) == ask_transformers(reference, processor, [picture(size)], prompt.prompt.text)


def test_several_images_of_different_shape(pipeline: Pipeline, reference: LlavaNextReference, processor: Any) -> None:
    images = [picture(size) for size in SIZES[:4]]
    prompt = pipeline.encode([Request(images, "What do they have in common?")], budget=pipeline.visual_tokens)[0]
    assert len({image.layout.num_tokens for image in prompt.images}) > 1
    assert greedy(pipeline, prompt) == ask_transformers(reference, processor, images, prompt.prompt.text)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("budget", [1, 7, 20, 40])
@pytest.mark.parametrize(("name", "question"), PAIRS[:3])
def test_pruned_answer_is_that_of_transformers_with_the_same_embeddings(
    name: str, question: str, budget: int, positions: Any, pipeline: Pipeline, reference: LlavaNextReference
) -> None:
    prompt = pipeline.encode([Request([photograph(name)], question)], budget=budget, positions=positions)[0]
    assert prompt.visual_tokens_kept == budget
    assert greedy(pipeline, prompt) == reference.generate(prompt.inputs_embeds, NEW_TOKENS, positions=prompt.positions)


@pytest.mark.parametrize("budget", [1, 7, 20, 40])
def test_kept_tokens_are_those_of_the_reference(budget: int, pipeline: Pipeline, reference: LlavaNextReference) -> None:
    """Transformers' features and packing, and the NumPy definition; the bipartite step may see one tie otherwise."""
    selection = pipeline.bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)
    same = 0
    for name, question in PAIRS:
        image = load_image(photograph(name))
        prompt = pipeline.encode([Request([image], question)], budget=budget)[0]
        rows = pipeline.embeddings.lookup(prompt.prompt.text_ids("prompt"))[None]
        mask = np.ones(rows.shape[:2], np.bool_)
        pixels = pipeline.inputs.prepare(image).inputs["pixel_values"]
        want = reference.visual(pixels, rows, mask, budget, config, image.size)
        same += np.array_equal(prompt.indices[0], want.indices[0])
    assert same >= len(PAIRS) - 1


def test_every_line_that_keeps_a_token_ends_with_a_newline(pipeline: Pipeline) -> None:
    """The newline's embedding stands behind the last kept token of its line, and nowhere else."""
    prompt = pipeline.encode([Request([picture((640, 480))], "What is this?")], budget=9)[0]
    (image,) = prompt.images
    rows, columns = image.layout.grids[1]
    overview = image.layout.num_tokens - rows * columns
    lines = sorted({(index - overview) // columns for index in image.indices.tolist() if index >= overview})
    newline = np.load(pipeline.bundle.file("image_newline.npy"))
    is_newline = (image.rows == newline).all(1)
    assert image.places[is_newline].tolist() == [overview + line * (columns + 1) + columns for line in lines]
    assert len(image.rows) == 9 + len(lines)


def test_an_image_with_fewer_tokens_than_the_budget_keeps_them_all(pipeline: Pipeline) -> None:
    images = [picture((2000, 3)), picture((500, 500))]
    prompt = pipeline.encode([Request(images, "What is this?")], budget=60)[0]
    assert [len(indices) for indices in prompt.indices] == [prompt.images[0].layout.num_tokens, 60]
    assert prompt.images[0].layout.num_tokens < 60


def test_a_pruned_prompt_survives_its_file(pipeline: Pipeline, tmp_path: Path) -> None:
    """The rows of its image are more than its kept tokens: newlines stand among them."""
    prompt = pipeline.encode([Request([picture((640, 480))], "What is this?")], budget=9)[0]
    write_prompt(tmp_path / "prompt.safetensors", prompt, pipeline.bundle, text_span="prompt")
    file = read_prompt(tmp_path / "prompt.safetensors")
    ((start, end),) = file.record.image_spans
    assert end - start == len(prompt.images[0].rows) > 9
    np.testing.assert_array_equal(file.inputs_embeds[start:end], prompt.images[0].rows)
    assert (file.token_ids[start:end] == pipeline.bundle.manifest.prompt.image_token_id).all()


def test_a_heat_map_has_panels_for_overview_and_tiles(pipeline: Pipeline) -> None:
    image = picture((640, 480))
    kept = pipeline.encode([Request([image], "What is this?")], budget=9)[0].images[0]
    sheet = draw_selection(pipeline.views(image), kept.indices, kept.scores, kept.layout.grids, "What is this?")
    alone = draw_selection([image], np.array([0]), kept.scores[:16], kept.layout.grids[:1], "What is this?")
    assert sheet.width == alone.width
    assert sheet.height > 1.5 * alone.height
    with pytest.raises(ConfigError, match="do not fill"):
        draw_selection([image], kept.indices, kept.scores, kept.layout.grids[:1], "")


def test_processor_and_model_have_to_agree_on_tiles(checkpoint: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    for file in ("preprocessor_config.json", "processor_config.json"):
        text = (copied / file).read_text() if (copied / file).is_file() else "{}"
        (copied / file).write_text(re.sub(r'"image_grid_pinpoints": \[', '"image_grid_pinpoints": [[56, 56],', text))
    settings = ExportSettings(str(copied), tmp_path / "bundle", decoder="none", engine_check="off")
    with pytest.raises(CheckpointError, match="do not belong together") as caught:
        bundle_from_checkpoint(settings)
    assert "(56, 56)" in str(caught.value.received)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("selector", ["uniform", "random"])
def test_selectors_of_one_grid_are_refused(selector: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same grid of visual tokens"):
        bundle_from_checkpoint(ExportSettings(str(checkpoint), tmp_path / "bundle", selector=selector))


@pytest.mark.parametrize("resolutions", [[], [[56, 60]]])
def test_resolutions_that_are_no_tiles_are_refused(resolutions: Any, checkpoint: Path) -> None:
    config = {**json.loads((checkpoint / "config.json").read_text()), "image_grid_pinpoints": resolutions}
    with pytest.raises(CheckpointError, match="not made of tiles"):
        adapter_class("llava_next")(config)


def test_batch_equals_one_by_one(pipeline: Pipeline) -> None:
    requests = [Request([picture(size)], question) for size, (_, question) in zip(SIZES[:6] * 2, PAIRS, strict=True)]
    together = pipeline.encode(requests, budget=11)
    for request, prompt in zip(requests, together, strict=True):
        alone = pipeline.encode([request], budget=11)[0]
        np.testing.assert_array_equal(prompt.indices[0], alone.indices[0])
        # Other batch sizes let ONNX Runtime choose other kernels, which sum in another order.
        np.testing.assert_allclose(prompt.inputs_embeds, alone.inputs_embeds, rtol=0, atol=1e-4)
