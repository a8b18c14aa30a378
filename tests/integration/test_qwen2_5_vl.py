"""Qwen2.5-VL: images at their own resolution against transformers' own processor and model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.asking import NEW_TOKENS, PAIRS, greedy, photograph, picture
from safetensors.torch import load_file, save_file

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.errors import ExportError, ImageError, LLMError
from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint
from flashvlm_export.export.reference import Qwen25VLReference, make_reference
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.prompt_file import read_prompt, write_prompt
from flashvlm_export.runtime.request import Pruning, Request
from flashvlm_export.selection import get_selector, select_tokens
from flashvlm_export.specs import Precision

SIZES = [(640, 480), (480, 640), (140, 140), (1600, 400), (1, 1), (57, 56), (2000, 11), (28, 5600), (171, 333)]


@pytest.fixture(scope="module")
def checkpoint(qwen_checkpoint: Path) -> Path:
    return qwen_checkpoint


@pytest.fixture(scope="module")
def bundle(qwen_bundle: Path) -> Path:
    return qwen_bundle


@pytest.fixture(scope="module", params=["fused", "split"])
def pipeline(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, precision="fp32", selectors=[] if request.param == "split" else None) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Qwen25VLReference:
    found = make_reference(checkpoint)
    assert isinstance(found, Qwen25VLReference)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_of_the_processor(
    size: tuple[int, int], pipeline: Pipeline, reference: Qwen25VLReference
) -> None:
    """Every patch of every window is one of the processor's, bit for bit, and in reading order they are all of them."""
    image = picture(size)
    given = reference.processor(image, return_tensors="np")
    prepared = pipeline.inputs.prepare(image)
    patches, mask = prepared.inputs["pixel_values"], prepared.inputs["patch_mask"]
    units = patches.reshape(-1, 4, patches.shape[-1])[prepared.rows.order]
    np.testing.assert_array_equal(units.reshape(-1, patches.shape[-1]), given["pixel_values"])
    assert (1, *(2 * side for side in prepared.layout.grids[0])) == tuple(given["image_grid_thw"][0])
    assert mask.sum() == len(given["pixel_values"])
    assert not patches[~mask].any()


@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_saliency_are_those_of_transformers(
    size: tuple[int, int], bundle: Path, reference: Qwen25VLReference
) -> None:
    """Windows of many shapes; the attention received in the last block as eager attention has it."""
    with Pipeline.open(bundle, precision="fp32", selectors=[], llm=None) as split:
        (encoded,) = split.session.encode([split.inputs.prepare(picture(size))])
    have = (encoded.patch_features, encoded.saliency, encoded.projected_tokens)
    want = reference.encode_image(picture(size), np.empty(0))
    for array, expected in zip(have, want, strict=True):
        # float32 sums in another order; as in the checks of an export.
        np.testing.assert_allclose(array, expected[0], rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "question"), PAIRS)
def test_unpruned_answer_is_that_of_transformers(
    name: str, question: str, pipeline: Pipeline, reference: Qwen25VLReference
) -> None:
    """From picture to tokens transformers does everything itself, positions of three axes too."""
    image = load_image(photograph(name))
    prompt = pipeline.encode([Request([image], question)], budget=pipeline.visual_tokens)[0]
    assert prompt.visual_tokens_kept == prompt.visual_tokens_before
    expected = reference.generate_unpruned_images(prompt.prompt.token_ids, [image], NEW_TOKENS)
    assert expected
    assert greedy(pipeline, prompt) == expected


def test_several_images_of_different_shape(pipeline: Pipeline, reference: Qwen25VLReference) -> None:
    images = [picture(size) for size in SIZES[:4]]
    prompt = pipeline.encode([Request(images, "What do they have in common?")], budget=pipeline.visual_tokens)[0]
    assert len({image.layout.num_tokens for image in prompt.images}) > 1
    expected = reference.generate_unpruned_images(prompt.prompt.token_ids, images, NEW_TOKENS)
    assert greedy(pipeline, prompt) == expected


@pytest.mark.parametrize("positions", [None, "contiguous"])
@pytest.mark.parametrize("budget", [1, 7, 20])
@pytest.mark.parametrize(("name", "question"), PAIRS[:3])
def test_pruned_answer_is_that_of_transformers_with_the_same_embeddings(
    name: str, question: str, budget: int, positions: Any, pipeline: Pipeline, reference: Qwen25VLReference
) -> None:
    prompt = pipeline.encode([Request([photograph(name)], question)], budget=budget, positions=positions)[0]
    assert prompt.visual_tokens_kept == budget
    assert greedy(pipeline, prompt) == reference.generate(prompt.inputs_embeds, NEW_TOKENS, positions=prompt.positions)


def test_kept_tokens_keep_their_positions(pipeline: Pipeline, reference: Qwen25VLReference) -> None:
    """Against transformers' own positions of the whole prompt, without the tokens that were dropped."""
    images = [picture((640, 480)), picture((200, 300))]
    request = Request(images, "What do they have in common?")
    whole = pipeline.encode([request], budget=pipeline.visual_tokens)[0]
    pruned = pipeline.encode([request], budget=5)[0]
    is_kept = np.ones(len(whole.inputs_embeds), np.bool_)
    start = 0
    for place, image, full in zip(pruned.prompt.image_positions, pruned.images, whole.images, strict=True):
        first = place + start
        is_kept[first : first + full.layout.num_tokens] = False
        is_kept[first + image.indices] = True
        start += full.layout.num_tokens - 1
    given = reference.processor(images, return_tensors="pt")
    repeats = np.ones(len(whole.prompt.token_ids), np.int64)
    repeats[list(whole.prompt.image_positions)] = [image.layout.num_tokens for image in whole.images]
    ids = torch.from_numpy(np.repeat(whole.prompt.token_ids, repeats))[None]
    kinds = (ids == reference.model.config.image_token_id).int()
    expected, _ = reference.model.model.get_rope_index(ids, kinds, image_grid_thw=given["image_grid_thw"])
    np.testing.assert_array_equal(whole.positions, expected[:, 0].T.numpy())
    np.testing.assert_array_equal(pruned.positions, whole.positions[is_kept])
    np.testing.assert_array_equal(pruned.inputs_embeds, whole.inputs_embeds[is_kept])


@pytest.mark.parametrize("budget", [1, 7, 20])
def test_kept_tokens_are_those_of_the_reference(budget: int, pipeline: Pipeline, reference: Qwen25VLReference) -> None:
    """Transformers' tokens and attention, and the NumPy definition; the bipartite step may see one tie otherwise."""
    selection = pipeline.bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)
    assert config.weigh_text
    same = 0
    for name, question in PAIRS:
        image = load_image(photograph(name))
        prompt = pipeline.encode([Request([image], question)], budget=budget)[0]
        rows = pipeline.embeddings.lookup(prompt.prompt.text_ids("prompt"))[None]
        seen = reference.encode_image(image, np.empty(0))
        want = select_tokens(*seen, rows, np.ones(rows.shape[:2], np.bool_), budget, config)
        same += np.array_equal(prompt.indices[0], want[0])
    assert same >= len(PAIRS) - 1


def test_batch_equals_one_by_one(pipeline: Pipeline) -> None:
    """Images of one number of tokens but other windows go through the graph together, others in turn."""
    sizes = [(140, 112), (280, 56), (140, 112), (640, 480), (280, 28)]  # of the first two, 2 and 3 windows
    asked = [
        (Request([picture(size)], question), Pruning(3)) for size, (_, question) in zip(sizes, PAIRS, strict=False)
    ]
    together = pipeline.encode_each(asked)
    assert [prompt.images[0].layout.num_tokens for prompt in together[:2]] == [20, 20]
    windows = [len(pipeline.inputs.prepare(picture(size)).inputs["patch_mask"]) for size in sizes[:2]]
    assert windows[0] != windows[1]
    for one, prompt in zip(asked, together, strict=True):
        alone = pipeline.encode_each([one])[0]
        np.testing.assert_array_equal(prompt.indices[0], alone.indices[0])
        # Other batch sizes let ONNX Runtime choose other kernels, which sum in another order.
        np.testing.assert_allclose(prompt.inputs_embeds, alone.inputs_embeds, rtol=0, atol=1e-4)
        assert greedy(pipeline, prompt) == greedy(pipeline, alone)


def test_what_is_asked_by_default_is_what_is_encoded_by_default(pipeline: Pipeline) -> None:
    request = Request([picture((300, 200))], "What is this?")
    asked = pipeline.ask(request.images[0], request.question, budget=6, params=SamplingParams(max_new_tokens=2))
    np.testing.assert_array_equal(asked.prompt.positions, pipeline.encode([request], budget=6)[0].positions)
    assert asked.prompt.positions.shape[1] == 3


def test_checkpoints_of_two_spellings_give_one_bundle(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """Qwen's own names, which the fixture has, and those since transformers 4.52."""
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    renamed = {}
    for name, tensor in load_file(copied / "model.safetensors").items():
        new = re.sub(r"^model\.", "model.language_model.", name)
        renamed[re.sub(r"^visual\.", "model.visual.", new)] = tensor
    assert {"model.visual.patch_embed.proj.weight", "model.language_model.norm.weight"} < renamed.keys()
    save_file(renamed, copied / "model.safetensors", metadata={"format": "pt"})
    settings = ExportSettings(
        str(copied), tmp_path / "bundle", precisions=[Precision.FP32], decoder="none", engine_check="off"
    )
    again = bundle_from_checkpoint(settings).manifest.source
    assert again.weights_sha256 == Bundle.open(bundle).manifest.source.weights_sha256


def test_calibration_sees_every_layer(bundle: Path, tmp_path: Path) -> None:
    """RMS norms begin sublayers; tokens, which are features too, are read once."""
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert main(["calibrate", str(copied), "--tolerance", "none"]) == 0
    checks = Bundle.open(copied).manifest.checks["int8"]
    # A block has attention (two products) and a gated feed-forward part (three); the merger two behind its norm.
    assert checks["census"]["int8_products"] == 4 * 5 + 2
    assert checks["calibration"]["layers"] == 4 * 2 + 1
    with Pipeline.open(copied, precision="int8", llm=None) as vlm:
        kept = vlm.encode([Request([picture((300, 200))], "What is this?")], budget=6)[0]
    assert kept.visual_tokens_kept == 6


def test_an_evaluation_needs_budgets_that_prune(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shares of the most visual tokens that an image can have would keep all of most images."""
    assert main(["eval", str(bundle), "--data", "none.jsonl", "--output", str(tmp_path / "results")]) == 2
    assert "differ in visual tokens" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_transformers_answers_the_same_prompt(bundle: Path, checkpoint: Path, pipeline: Pipeline) -> None:
    prompt = pipeline.encode([Request([picture((300, 200))], "What is this?")], budget=6)[0]
    with Pipeline.open(bundle, llm=f"transformers:{checkpoint}") as other:
        assert greedy(other, prompt) == greedy(pipeline, prompt)


def test_bad_input_is_refused(bundle: Path, pipeline: Pipeline) -> None:
    with pytest.raises(ImageError, match="too long and thin"):
        pipeline.encode([Request([picture((2010, 10))], "What is this?")])
    prompt = pipeline.encode([Request([picture((300, 200))], "What is this?")], budget=6)[0]
    with pytest.raises(LLMError, match="not the positions"):
        pipeline.answer(replace(prompt, positions=prompt.positions[:, 0]))
    for engine in ("llamacpp:nowhere.gguf", "vllm:http://localhost:1"):  # before any of it is looked for
        with pytest.raises(LLMError, match="has other positions than this model") as caught:
            Pipeline.open(bundle, llm=engine)
        assert "transformers" in str(caught.value.hint)
    counting = Pipeline.open(bundle)
    counting.bundle = Bundle(bundle, replace(counting.bundle.manifest, position_axes=1))
    with pytest.raises(LLMError, match="has other positions than this model"):
        counting.load()


def test_rotation_that_decoders_cannot_have_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    rotation = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    config["text_config"]["rope_parameters"].update(rotation)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="rotary position embedding"):
        bundle_from_checkpoint(ExportSettings(str(copied), tmp_path / "bundle", decoder="fp32", engine_check="off"))


@pytest.mark.parametrize("size", SIZES)
def test_unpruned_answer_about_an_image_of_any_shape(
    size: tuple[int, int], pipeline: Pipeline, reference: Qwen25VLReference
) -> None:
    prompt = pipeline.encode([Request([picture(size)], "What is this?")], budget=pipeline.visual_tokens)[0]
    expected = reference.generate_unpruned_images(prompt.prompt.token_ids, [picture(size)], NEW_TOKENS)
    assert greedy(pipeline, prompt) == expected


def test_a_pruned_prompt_survives_its_file(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    prompt = pipeline.encode([Request([picture((300, 200))], "What is this?")], budget=6)[0]
    write_prompt(tmp_path / "prompt.safetensors", prompt, pipeline.bundle, text_span="prompt")
    file = read_prompt(tmp_path / "prompt.safetensors")
    np.testing.assert_array_equal(file.positions, prompt.positions)
    assert file.has_gaps
    said = [token for token, _ in pipeline.generate(file.inputs_embeds, file.positions) if token is not None]
    assert said == pipeline.answer(prompt).token_ids
