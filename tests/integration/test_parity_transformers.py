"""The pipeline against transformers' own LLaVA: the same greedy tokens, unpruned and pruned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.asking import NEW_TOKENS, PAIRS, greedy, photograph

from flashvlm_export.bundle import Bundle
from flashvlm_export.export.reference import LlavaReference
from flashvlm_export.runtime.embeddings import pad_text
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Request
from flashvlm_export.selection import get_selector


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle, precision="fp32") as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> LlavaReference:
    return LlavaReference(tiny_checkpoint)


@pytest.mark.parametrize(("name", "question"), PAIRS)
def test_unpruned_answer_is_that_of_transformers(
    name: str, question: str, pipeline: Pipeline, reference: LlavaReference
) -> None:
    """transformers gets pixels and token ids and does everything else itself."""
    image = photograph(name)
    prompt = pipeline.encode([Request([image], question)], budget=pipeline.visual_tokens)[0]
    expected = reference.generate_unpruned(
        prompt.prompt.token_ids, pipeline.preprocess([load_image(image)]), NEW_TOKENS
    )
    assert expected
    assert greedy(pipeline, prompt) == expected


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("budget", [1, 5, 11])
@pytest.mark.parametrize(("name", "question"), PAIRS[:5])
def test_pruned_answer_is_that_of_transformers_with_the_same_embeddings(
    name: str, question: str, budget: int, positions: Any, pipeline: Pipeline, reference: LlavaReference
) -> None:
    prompt = pipeline.encode([Request([photograph(name)], question)], budget=budget, positions=positions)[0]
    assert prompt.visual_tokens_kept == budget
    assert greedy(pipeline, prompt) == reference.generate(prompt.inputs_embeds, NEW_TOKENS, positions=prompt.positions)


@pytest.mark.parametrize("budget", [1, 4, 7, 16])
def test_kept_tokens_are_those_of_the_reference(budget: int, pipeline: Pipeline, reference: LlavaReference) -> None:
    """All photographs in one batch, against transformers' features and the NumPy definition.

    float32 encoders differ by 1e-6, which can move a close decision of the bipartite step in some image: at most one of
    twelve may differ, and tokens of the same index are equal to that precision.
    """
    requests = [Request([photograph(name)], question) for name, question in PAIRS]
    prompts = pipeline.encode(requests, budget=budget)
    pixels = pipeline.preprocess([load_image(request.images[0]) for request in requests])
    rows = [pipeline.embeddings.lookup(prompt.prompt.text_ids("prompt")) for prompt in prompts]
    text_embeds, text_mask = pad_text(rows)
    selection = pipeline.bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)
    expected = reference.visual(pixels, text_embeds, text_mask, budget, config)
    indices = np.stack([prompt.indices[0] for prompt in prompts])
    assert (indices == expected.indices).all(axis=1).sum() >= len(PAIRS) - 1
    outputs = pipeline.session.run(
        {"pixel_values": pixels, "text_embeds": text_embeds, "text_mask": text_mask, "budget": np.array(budget)}
    )
    want = np.take_along_axis(expected.all_tokens, outputs.indices[:, :, None], axis=1)
    np.testing.assert_allclose(outputs.tokens, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_batch_equals_one_by_one(pipeline: Pipeline) -> None:
    """Several images and questions of different length in one batch answer as each does alone."""
    requests = [Request([photograph(name)], question) for name, question in PAIRS[:4]]
    together = pipeline.encode(requests, budget=6)
    for request, prompt in zip(requests, together, strict=True):
        alone = pipeline.encode([request], budget=6)[0]
        np.testing.assert_array_equal(prompt.indices[0], alone.indices[0])
        # Other batch sizes let ONNX Runtime choose other kernels, which sum in another order.
        np.testing.assert_allclose(prompt.inputs_embeds, alone.inputs_embeds, rtol=0, atol=1e-4)
        assert greedy(pipeline, prompt) == greedy(pipeline, alone)


def test_several_images_in_one_request(pipeline: Pipeline, reference: LlavaReference) -> None:
    images = [photograph("chelsea"), photograph("coffee")]
    request = Request(images, "What do both have in common?")
    prompt = pipeline.encode([request], budget=pipeline.visual_tokens)[0]
    assert prompt.visual_tokens_kept == 2 * pipeline.visual_tokens
    pixels = pipeline.preprocess([load_image(image) for image in images])
    expected = reference.generate_unpruned(prompt.prompt.token_ids, pixels, NEW_TOKENS)
    assert greedy(pipeline, prompt) == expected
    pruned = pipeline.encode([request], budget=3)[0]
    assert [len(indices) for indices in pruned.indices] == [3, 3]


def test_half_precision_graph_keeps_nearly_the_same_tokens(tiny_bundle: Path, pipeline: Pipeline) -> None:
    """The important half, which follows the score, has to survive float16; the diverse half of bipartite is chaotic."""
    requests = [Request([photograph(name)], question) for name, question in PAIRS]
    with Pipeline.open(tiny_bundle, precision="fp16", llm=None) as half:
        halves = half.encode(requests, budget=8)
    fulls = pipeline.encode(requests, budget=8)
    same = 0
    for a, b in zip(halves, fulls, strict=True):
        best = np.argsort(-b.scores[0], kind="stable")[:4]
        same += int(np.isin(best, a.indices[0]).sum())
        # Fused scores lie in 0..1; the sharpening multiplies float16's 1e-3 by up to 250 before it is squashed.
        assert np.median(np.abs(a.scores[0] - b.scores[0])) < 0.02
    assert same >= 0.9 * 4 * len(PAIRS)


def test_streamed_pieces_make_up_the_answer(pipeline: Pipeline) -> None:
    prompt = pipeline.encode([Request([photograph("coffee")], "What is in the cup?")], budget=8)[0]
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    answer = pipeline.answer(prompt, params)
    assert "".join(pipeline.stream(prompt, params)) == answer.text
    assert pipeline.prompts.tokenizer.decode(answer.token_ids, skip_special_tokens=True) == answer.text
    assert answer.stats.new_tokens >= len(answer.token_ids) > 4


def test_bundle_describes_the_checkpoint(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle, verify=True).manifest
    assert manifest.dims.num_patches == 16
    assert manifest.vocab_size == 320
    assert manifest.checks["fp32"]["parity"]["exact_rows"] == 7
