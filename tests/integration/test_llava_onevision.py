"""LLaVA-OneVision: SigLIP without CLS token, tiles scaled down behind the encoder, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.asking import NEW_TOKENS, PAIRS, greedy, photograph, picture
from helpers.serving import png, user
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionImageProcessorPil

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.errors import CheckpointError
from flashvlm_export.export.reference import LlavaOnevisionReference, make_reference
from flashvlm_export.models import MODELS, adapter_class
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Exchange, Request
from flashvlm_export.runtime.server.conversation import Intake
from flashvlm_export.runtime.server.listening import describe
from flashvlm_export.runtime.server.schema import ChatRequest
from flashvlm_export.runtime.server.settings import ServerSettings
from flashvlm_export.selection import get_selector

# The first five have more tokens in tiles than nine tiles', and are scaled down.
SIZES = [(640, 480), (480, 640), (500, 500), (1600, 400), (300, 300), (42, 42), (130, 80), (1, 1), (57, 56), (37, 211)]


@pytest.fixture(scope="module")
def checkpoint(onevision_checkpoint: Path) -> Path:
    return onevision_checkpoint


@pytest.fixture(scope="module")
def bundle(onevision_bundle: Path) -> Path:
    return onevision_bundle


@pytest.fixture(scope="module", params=["fused", "split"])
def pipeline(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, precision="fp32", selectors=[] if request.param == "split" else None) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlavaOnevisionReference:
    found = make_reference(checkpoint)
    assert isinstance(found, LlavaOnevisionReference)
    return found


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return LlavaOnevisionImageProcessorPil.from_pretrained(checkpoint)


def ask_transformers(
    reference: LlavaOnevisionReference, processor: Any, images: list[Image.Image], token_ids: np.ndarray
) -> list[int]:
    """Return the answer of transformers, which prepares, encodes and packs the images of one conversation itself.

    Its processor for text and images needs torchvision; here the model says how many placeholders each image takes.
    """
    given = processor([images], return_tensors="pt")
    model = reference.model
    with torch.no_grad():
        found = model.model.get_image_features(**given)
    repeats = np.ones(len(token_ids), np.int64)
    repeats[token_ids == model.config.image_token_id] = [len(rows) for rows in found.pooler_output]
    ids = torch.from_numpy(np.repeat(token_ids, repeats))[None]
    with torch.no_grad():
        output = model.generate(
            **given, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    said: list[int] = output[0, ids.shape[1] :].tolist()
    return said[:-1] if said[-1] == model.generation_config.eos_token_id else said


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_processor(size: tuple[int, int], pipeline: Pipeline, processor: Any) -> None:
    image = picture(size)
    given = processor([image], return_tensors="np")
    np.testing.assert_array_equal(pipeline.inputs.prepare(image).inputs["pixel_values"], given["pixel_values"][0])
    of_several = processor([[image, picture((30, 40))]], return_tensors="np")
    prepared = pipeline.inputs.prepare(image, several=True)
    np.testing.assert_array_equal(prepared.inputs["pixel_values"], of_several["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_saliency_are_those_of_transformers(
    size: tuple[int, int], bundle: Path, reference: LlavaOnevisionReference
) -> None:
    """Features, attention received and tokens, in the order and on the grid to which transformers packs them."""
    with Pipeline.open(bundle, precision="fp32", selectors=[], llm=None) as split:
        prepared = split.inputs.prepare(picture(size))
        (encoded,) = split.session.encode([prepared])
    have = (encoded.patch_features, encoded.saliency, encoded.projected_tokens)
    want = reference.encode_image(picture(size), prepared.inputs["pixel_values"])
    for array, expected in zip(have, want, strict=True):
        # float32 sums in another order; as in the checks of an export.
        np.testing.assert_allclose(array, expected[0], rtol=0, atol=2e-5 * np.abs(expected).max())


def test_many_tiles_are_scaled_down_and_few_are_not(pipeline: Pipeline) -> None:
    whole, small = (pipeline.inputs.prepare(picture(size)) for size in ((500, 500), (130, 80)))
    assert small.layout.grids == ((3, 3), (6, 10))
    assert (small.rows.weights[:, 0] == 1).all()
    assert whole.layout.grids == ((3, 3), (9, 9))
    assert len(whole.inputs["pixel_values"]) == 1 + 36


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize(("name", "question"), PAIRS)
def test_unpruned_answer_is_that_of_transformers(
    name: str, question: str, positions: Any, pipeline: Pipeline, reference: LlavaOnevisionReference, processor: Any
) -> None:
    image = load_image(photograph(name))
    prompt = pipeline.encode([Request([image], question)], budget=pipeline.visual_tokens, positions=positions)[0]
    np.testing.assert_array_equal(prompt.positions, np.arange(len(prompt.inputs_embeds)))
    expected = ask_transformers(reference, processor, [image], prompt.prompt.token_ids)
    assert expected
    assert greedy(pipeline, prompt) == expected


@pytest.mark.parametrize("size", SIZES)
def test_unpruned_answer_about_an_image_of_any_shape(
    size: tuple[int, int], pipeline: Pipeline, reference: LlavaOnevisionReference, processor: Any
) -> None:
    prompt = pipeline.encode([Request([picture(size)], "What is this?")], budget=pipeline.visual_tokens)[0]
    assert greedy(pipeline, prompt) == ask_transformers(reference, processor, [picture(size)], prompt.prompt.token_ids)


def test_of_several_images_each_is_one_picture(
    pipeline: Pipeline, reference: LlavaOnevisionReference, processor: Any
) -> None:
    images = [picture(size) for size in SIZES[:4]]
    prompt = pipeline.encode([Request(images, "What do they have in common?")], budget=pipeline.visual_tokens)[0]
    assert [image.layout.length for image in prompt.images] == [9 + 1] * 4
    assert greedy(pipeline, prompt) == ask_transformers(reference, processor, images, prompt.prompt.token_ids)


def test_an_image_that_is_joined_by_another_is_encoded_anew(bundle: Path) -> None:
    """Of one image tiles are remembered, of several one picture each: neither is taken for the other."""
    image = picture((640, 480))
    with Pipeline.open(bundle, precision="fp32", selectors=[]) as split:
        alone = split.encode([Request([image], "What is this?")], budget=107)[0]
        request = Request([picture((30, 40))], "And this?", history=[Exchange([image], "What is this?", "Noise.")])
        together = split.encode([request], budget=107)[0]
        again = split.encode([Request([image], "What is this?")], budget=107)[0]
        assert split.images.stats.images == 3
    assert len(alone.indices[0]) > len(together.indices[0]) == 9
    np.testing.assert_array_equal(again.inputs_embeds, alone.inputs_embeds)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("budget", [1, 7, 20, 40])
@pytest.mark.parametrize(("name", "question"), PAIRS[:3])
def test_pruned_answer_is_that_of_transformers_with_the_same_embeddings(
    name: str, question: str, budget: int, positions: Any, pipeline: Pipeline, reference: LlavaOnevisionReference
) -> None:
    prompt = pipeline.encode([Request([photograph(name)], question)], budget=budget, positions=positions)[0]
    assert prompt.visual_tokens_kept == budget
    assert greedy(pipeline, prompt) == reference.generate(prompt.inputs_embeds, NEW_TOKENS, positions=prompt.positions)


@pytest.mark.parametrize("budget", [1, 7, 20, 40])
def test_kept_tokens_are_those_of_the_reference(
    budget: int, pipeline: Pipeline, reference: LlavaOnevisionReference
) -> None:
    """Transformers' features and packing, and the NumPy definition; the bipartite step may see one tie otherwise."""
    selection = pipeline.bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)
    same = 0
    for name, question in PAIRS:
        image = load_image(photograph(name))
        prompt = pipeline.encode([Request([image], question)], budget=budget)[0]
        rows = pipeline.embeddings.lookup(prompt.prompt.text_ids("prompt"))[None]
        pixels = pipeline.inputs.prepare(image).inputs["pixel_values"]
        want = reference.visual(pixels, rows, np.ones(rows.shape[:2], np.bool_), budget, config, image.size)
        same += np.array_equal(prompt.indices[0], want.indices[0])
    assert same >= len(PAIRS) - 1


def test_the_template_is_that_of_the_checkpoint_where_it_has_none(checkpoint: Path, bundle: Path) -> None:
    adapter = adapter_class("llava_onevision")(json.loads((checkpoint / "config.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    own, default = (
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        for template in (tokenizer.chat_template, adapter.default_chat_template)
    )
    assert own == default == "<|im_start|>user <image>\nWhat is this?<|im_end|><|im_start|>assistant\n"


def test_what_tensorrt_cannot_sort_is_scaled_down_further_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the released size, where nine tiles have 6,561 visual tokens; see :data:`MOST_TOKENS`."""
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows["llava-onevision-7b"]["visual_tokens"] == 3375
    adapter = adapter_class("llava_onevision")(MODELS["llava-onevision-7b"].config)
    assert adapter.dims.num_patches == 3375
    assert adapter.dims.most_area == 3
    assert "anyres_max_3" in adapter.notes[0]


def test_a_bundle_scales_the_reference_down_as_far(bundle: Path, checkpoint: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.manifest.dims.most_area == 9
    assert make_reference(checkpoint, like=opened).model.config.vision_aspect_ratio == "anyres_max_9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is not supported"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is not supported"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision tower is not supported"),
    ],
)
def test_what_the_adapter_does_not_do_is_refused(change: dict[str, Any], message: str, checkpoint: Path) -> None:
    config = {**json.loads((checkpoint / "config.json").read_text()), **change}
    with pytest.raises(CheckpointError, match=message):
        adapter_class("llava_onevision")(config)


def test_clients_of_the_server_are_told_where_the_encoder_looks(pipeline: Pipeline, bundle: Path) -> None:
    """One picture is seen in tiles, all of it; several are padded to squares."""
    settings = ServerSettings(bundle=bundle, name="tiny")
    intake = Intake(describe(pipeline, settings), settings)

    def views(*sizes: tuple[int, int]) -> list[tuple[float, ...]]:
        messages = [user("What are these?", *(png(1, size) for size in sizes))]
        return [*intake.asked(ChatRequest.model_validate({"model": "tiny", "messages": messages})).views]

    assert views((80, 40)) == [(0, 0, 1, 1)]
    assert views((80, 40), (40, 80)) == [(0, -0.5, 1, 1.5), (-0.5, 0, 1.5, 1)]
