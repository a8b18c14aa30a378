"""The pipeline with a session in NumPy and a scripted language model: what flows where, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import (
    BudgetError,
    BundleError,
    ConfigError,
    LLMError,
    PromptError,
    SessionError,
    UsageError,
)
from flashvlm_export.runtime.llm.base import Capabilities, Generation, Limits, LLMEngine, SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Pruning, Request
from flashvlm_export.runtime.sessions.base import VisualOutputs
from flashvlm_export.runtime.sessions.fake import FakeSession
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.specs import Feeds, Precision


class RecordingSession(FakeSession):
    """Remembers what it was fed, and how often."""

    runs = 0

    def _run(self, feeds: Feeds) -> VisualOutputs:
        self.feeds, self.runs = dict(feeds), self.runs + 1
        return super()._run(feeds)


class ScriptedLLM(LLMEngine):
    """Says the same ids whatever the prompt, and remembers the prompt."""

    name = "scripted"
    capabilities = Capabilities(
        embeddings=True, explicit_positions=True, batch=False, streaming=True, sampling=True, prefix_reuse=False
    )

    def __init__(self, ids: list[int], width: int) -> None:
        super().__init__()
        self.ids = ids
        self.width = width

    def _open(self) -> Limits:
        return Limits(width=self.width, max_positions=1024, vocab_size=320)

    def _close(self) -> None:
        pass

    def _generate(self, generation: Generation) -> Generator[int, None, None]:
        self.inputs_embeds, self.positions = generation.rows, generation.positions
        yield from self.ids


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def pipeline(bundle: Bundle) -> Generator[Pipeline, None, None]:
    session = RecordingSession(bundle.manifest.graphs["fp32"].spec)
    with Pipeline(bundle, session, ScriptedLLM([10, 11, 12], bundle.manifest.dims.llm_width)) as opened:
        yield opened


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), np.uint8))


def test_visual_tokens_stand_where_the_placeholder_stood(pipeline: Pipeline) -> None:
    prompt = pipeline.encode([Request([picture()], "What is it?")], budget=5)[0]
    (place,) = prompt.prompt.image_positions
    ids = prompt.prompt.token_ids
    assert prompt.inputs_embeds.shape == (len(ids) - 1 + 5, pipeline.bundle.manifest.dims.llm_width)
    text = np.concatenate([prompt.inputs_embeds[:place], prompt.inputs_embeds[place + 5 :]])
    np.testing.assert_array_equal(text, pipeline.embeddings.lookup(np.delete(ids, place)))
    outputs = pipeline.session.run(pipeline.session.feeds)
    np.testing.assert_array_equal(prompt.inputs_embeds[place : place + 5], outputs.tokens[0])
    assert prompt.visual_tokens_kept == 5
    assert prompt.visual_tokens_before == 16


def test_text_span_decides_what_guides_the_selection(pipeline: Pipeline) -> None:
    request = Request([picture()], "What is it?")
    fed = {}
    for span in ("prompt", "question"):
        prompt = pipeline.encode([request], budget=5, text_span=span)[0]
        fed[span] = pipeline.session.feeds["text_embeds"][0]
    assert len(fed["prompt"]) == len(prompt.prompt.token_ids) - 1
    np.testing.assert_array_equal(fed["question"], pipeline.embeddings.lookup(prompt.prompt.text_ids("question")))
    assert 0 < len(fed["question"]) < len(fed["prompt"])
    with pytest.raises(ConfigError, match="span"):
        pipeline.encode([request], text_span="answer")


def test_positions_reach_the_language_model(pipeline: Pipeline) -> None:
    request = Request([picture(1), picture(2)], "What is it?")
    prompt = pipeline.encode([request], budget=5, positions="original")[0]
    first, second = prompt.prompt.image_positions
    pipeline.answer(prompt)
    np.testing.assert_array_equal(pipeline.llm.positions, prompt.positions)
    np.testing.assert_array_equal(prompt.positions[first : first + 5], first + prompt.indices[0])
    behind = second + pipeline.visual_tokens - 1
    np.testing.assert_array_equal(prompt.positions[second + 4 : second + 9], behind + prompt.indices[1])
    assert prompt.positions[-1] == len(prompt.prompt.token_ids) - 1 + 2 * (pipeline.visual_tokens - 1)

    pipeline.ask(picture(), "What is it?", budget=5)
    assert pipeline.llm.positions.tolist() == list(range(len(pipeline.llm.inputs_embeds)))
    with pytest.raises(ConfigError, match="contiguous or original"):
        pipeline.encode([request], positions="absolute")


def test_a_batch_is_one_run_and_a_request_may_hold_several_images(pipeline: Pipeline) -> None:
    requests = [Request([picture(1), picture(2)], "Compare them."), Request([picture(3)], "And this, in many words?")]
    first, second = pipeline.encode(requests, budget=4)
    feeds = pipeline.session.feeds
    assert feeds["pixel_values"].shape[0] == 3
    assert feeds["text_mask"].sum(axis=1).tolist() == [
        len(first.prompt.token_ids) - 2,
        len(first.prompt.token_ids) - 2,
        len(second.prompt.token_ids) - 1,
    ]
    assert [len(prompt.indices) for prompt in (first, second)] == [2, 1]
    alone = pipeline.encode(requests[1:], budget=4)[0]
    np.testing.assert_array_equal(second.indices[0], alone.indices[0])


def test_a_prompt_that_is_too_long_is_refused_before_anything_runs(pipeline: Pipeline) -> None:
    """With the budget that would fit, which then does."""
    pictures = [picture(seed) for seed in range(70)]
    with pytest.raises(LLMError, match="too long for the language model") as refused:
        pipeline.encode([Request(pictures, "What?")], budget=16)
    with pytest.raises(LLMError, match=r"at most \d+ visual tokens of an image, with contiguous positions"):
        pipeline.encode([Request(pictures, "What?")], budget=2, positions="original")
    with pytest.raises(LLMError, match=r"fewer images, or \d+ tokens less of text"):
        pipeline.encode([Request([picture()], "far " * 1200)], budget=2)
    assert pipeline.session.runs == 0
    fitting = int(re.search(r"at most (\d+) visual", str(refused.value)).group(1))
    with pytest.raises(LLMError):
        pipeline.encode([Request(pictures, "What?")], budget=fitting + 1)
    prompt = pipeline.encode([Request(pictures, "What?")], budget=fitting)[0]
    assert len(prompt.inputs_embeds) < pipeline.llm.limits.max_positions


def test_each_request_has_its_own_pruning(pipeline: Pipeline) -> None:
    """The images come back to their requests, though those with one budget are selected together."""
    asked = [
        (Request([picture(1), picture(2)], "Compare them."), Pruning(4)),
        (Request([picture(3)], "And this?"), Pruning(9, positions="original")),
        (Request([picture(4)], "And that, in many words?"), Pruning(4, text_span="question")),
        (Request([picture(5)], "What?"), Pruning()),
    ]
    for prompt, (request, pruning) in zip(pipeline.encode_each(asked), asked, strict=True):
        alone = pipeline.encode_each([(request, pruning)])[0]
        assert [len(kept) for kept in prompt.indices] == [pruning.budget or pipeline.default_budget] * len(
            prompt.images
        )
        np.testing.assert_array_equal(prompt.indices, alone.indices)
        np.testing.assert_array_equal(prompt.inputs_embeds, alone.inputs_embeds)
        np.testing.assert_array_equal(prompt.positions, alone.positions)
    before = pipeline.session.runs
    pipeline.encode_each(asked)
    assert pipeline.session.runs == before + 3  # budgets 4, 9 and the default
    with pytest.raises(BudgetError):
        pipeline.encode_each([*asked, (asked[0][0], Pruning(17))])
    assert pipeline.session.runs == before + 3


def test_answer_carries_text_tokens_and_times(pipeline: Pipeline) -> None:
    answer = pipeline.ask(picture(), "What is it?", budget=3)
    assert answer.token_ids == [10, 11, 12]
    assert answer.text == pipeline.prompts.tokenizer.decode([10, 11, 12])
    assert set(answer.stage_ms) == {
        "tokenize",
        "load_images",
        "preprocess",
        "visual",
        "splice",
        "prefill",
        "decode",
    }
    assert all(ms >= 0 for ms in answer.stage_ms.values())
    np.testing.assert_array_equal(pipeline.llm.inputs_embeds, answer.prompt.inputs_embeds)


@pytest.mark.parametrize("images", ["photo.jpg", Path("photo.jpg"), b"bytes", np.zeros((2, 2, 3), np.uint8)])
def test_one_image_instead_of_a_list(images: object) -> None:
    with pytest.raises(UsageError, match="are a list"):
        Request(images, "What is it?")


def test_an_answer_ends_before_a_stop_text(pipeline: Pipeline) -> None:
    whole = pipeline.ask(picture(), "What is it?", budget=3)
    texts = [pipeline.prompts.tokenizer.decode([token]) for token in whole.token_ids]
    assert len(set(texts)) == 3
    assert all(texts)
    second = whole.text.index(texts[1].strip())
    cut = pipeline.ask(picture(), "What is it?", budget=3, params=SamplingParams(stop=("never", texts[1].strip())))
    assert cut.text == whole.text[:second]
    assert cut.token_ids == whole.token_ids[:2]
    assert cut.stats.finish_reason == "stop"
    # What might have been the beginning of a stop text, and was none, comes in the end.
    kept = pipeline.ask(picture(), "What is it?", params=SamplingParams(stop=(whole.text[-1] + "?",)))
    assert kept.text == whole.text
    assert kept.stats.finish_reason == "stop"  # the scripted engine ends by itself


@pytest.mark.parametrize("stop", [("",), "text", ("a", 3), ["a"]])
def test_stop_texts_that_are_none(stop: object) -> None:
    with pytest.raises(ConfigError, match="stop"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("budget", [0, -1, 17, "5", 2.5])
def test_budget_is_refused_before_anything_runs(pipeline: Pipeline, budget: object) -> None:
    with pytest.raises(BudgetError):
        pipeline.encode([Request(["no such file.png"], "What is it?")], budget=budget)


def test_full_keeps_every_token(pipeline: Pipeline) -> None:
    (full,) = pipeline.encode([Request([picture()], "What is it?")], budget="full")
    assert full.indices[0].tolist() == list(range(16))
    with pytest.raises(BudgetError, match="not a whole number"):
        pipeline.encode([Request([picture()], "What is it?")], budget="most")


def test_requests_that_make_no_sense(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="no requests"):
        pipeline.encode([])
    with pytest.raises(PromptError, match="empty"):
        pipeline.encode([Request([picture()], "")])
    with pytest.raises(PromptError, match="placeholders"):
        pipeline.encode([Request([picture()], "no placeholder", raw=True)])


def test_without_language_model(bundle: Bundle) -> None:
    with Pipeline(bundle, FakeSession(bundle.manifest.graphs["fp32"].spec), None) as visual_only:
        prompt = visual_only.encode([Request([picture()], "What is it?")], budget=2)[0]
        with pytest.raises(UsageError, match="without a language model"):
            visual_only.answer(prompt)


def test_session_refuses_what_is_not_its_contract(bundle: Bundle) -> None:
    spec = bundle.manifest.graphs["fp32"].spec
    session = OnnxRuntimeSession(bundle.graph_file(Precision.FP32), spec)
    with pytest.raises(SessionError, match="not open"):
        session.run({})
    with pytest.raises(SessionError, match="no such execution provider"):
        OnnxRuntimeSession(session.file, spec, providers=("NoSuchExecutionProvider",)).open()
    with pytest.raises(SessionError, match="not the graph that the manifest describes"):
        OnnxRuntimeSession(session.file, bundle.manifest.graphs["fp16"].spec).open()
    with pytest.raises(ConfigError, match="no visual graph in this precision"):
        Pipeline.open(bundle, precision="int8")
    with pytest.raises(ConfigError, match="unknown precision"):
        Pipeline.open(bundle, precision="fp8")


def test_real_session_rows_do_not_influence_each_other(bundle: Bundle) -> None:
    """A row's outputs do not change when its neighbours do."""
    spec = bundle.manifest.graphs["fp32"].spec
    rng = np.random.default_rng(0)
    dims = bundle.manifest.dims
    feeds = {
        "pixel_values": rng.standard_normal((3, 3, dims.image_size, dims.image_size), np.float32),
        "text_embeds": rng.standard_normal((3, 9, dims.llm_width), np.float32),
        "text_mask": np.ones((3, 9), bool),
        "budget": np.array(7),
    }
    with OnnxRuntimeSession(bundle.graph_file(Precision.FP32), spec) as session:
        before = session.run(feeds)
        other = {name: array.copy() for name, array in feeds.items()}
        other["pixel_values"][[0, 2]] *= -2
        other["text_embeds"][[0, 2]] = 1
        other["text_mask"][0, 3:] = False
        after = session.run(other)
    for name in ("tokens", "indices", "scores"):
        np.testing.assert_array_equal(getattr(before, name)[1], getattr(after, name)[1])
    assert not np.array_equal(before.indices[0], after.indices[0])


def test_bundle_without_tokenizer_takes_no_questions(bundle: Bundle) -> None:
    import dataclasses

    bare = Bundle(bundle.path, dataclasses.replace(bundle.manifest, prompt=None))
    with pytest.raises(BundleError, match="no tokenizer"):
        Pipeline(bare, FakeSession(bundle.manifest.graphs["fp32"].spec), None)
    mute = Bundle(bundle.path, dataclasses.replace(bundle.manifest, decoder=None))
    with pytest.raises(BundleError, match="no language model"):
        Pipeline.open(mute)


def test_the_whole_way_without_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    """`flashvlm run` in a fresh process, with imports of torch and transformers made to fail."""
    picture().save(tmp_path / "photo.png")
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from flashvlm_export.cli import main\n"
        f"code = main(['run', {str(tiny_bundle)!r}, '--image', {str(tmp_path / 'photo.png')!r}, '--prompt', 'What?',"
        f" '--budget', '4', '--max-tokens', '6', '--heatmap', {str(tmp_path / 'kept.png')!r}, '--json'])\n"
        "raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    import json

    (answer,) = json.loads(done.stdout)["answers"]
    assert answer["kept_tokens"] == 4
    assert answer["new_tokens"] >= 1
    with Image.open(tmp_path / "kept.png") as heatmap:
        assert heatmap.width > heatmap.height > 500
