"""Videos with both families that take them, against transformers, which sees the frames first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.asking import NEW_TOKENS, greedy, picture
from helpers.clips import clip_of, frame, write_video
from PIL import Image
from transformers import LlavaOnevisionImageProcessorPil, Qwen2VLImageProcessorPil

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.errors import BudgetError, ConfigError, LLMError, PromptError, UsageError, VideoError
from flashvlm_export.export.reference import LlavaReference, make_reference
from flashvlm_export.preprocessor import decode_preprocessor
from flashvlm_export.runtime.chat import Chat
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.prompt_file import read_prompt, write_prompt
from flashvlm_export.runtime.request import PrunedPrompt, Pruning, Request
from flashvlm_export.runtime.video import FrameWindow, Video
from flashvlm_export.runtime.wanted import divided, relevance
from flashvlm_export.selection import get_selector
from flashvlm_export.selection.config import FlashVLMConfig

QUESTION = "What happens in this video?"


@pytest.fixture(scope="module", params=["onevision", "qwen"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(family: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{family}_checkpoint")


@pytest.fixture(scope="module")
def bundle(family: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{family}_bundle")


@pytest.fixture(scope="module")
def fused(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, precision="fp32") as opened:
        yield opened


@pytest.fixture(scope="module")
def split(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, precision="fp32", selectors=[]) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlavaReference:
    return make_reference(checkpoint)


def whole(pipeline: Pipeline, video: Video) -> PrunedPrompt:
    """Return the prompt with everything kept."""
    moments = -(-len(video.frames) // pipeline.bundle.manifest.video.frames_per_moment)
    return pipeline.encode([Request([video], QUESTION)], budget=moments * pipeline.visual_tokens)[0]


def frames_of(video: Video) -> list[Image.Image]:
    return [each for each in video.frames if isinstance(each, Image.Image)]


def as_transformers_takes_it(checkpoint: Path, reference: LlavaReference, video: Video) -> tuple[dict[str, Any], int]:
    """Return what transformers' model takes of a video, and how many placeholders that is.

    Its video processors need torchvision. Each frame goes through its image processor instead; how frames come together
    is what the video processors' documentation says.
    """
    images = frames_of(video)
    if reference.model.config.model_type == "llava_onevision":
        processor: Any = LlavaOnevisionImageProcessorPil.from_pretrained(checkpoint)
        pixels = torch.stack([processor([image], return_tensors="pt")["pixel_values"][0, 0] for image in images])
        return {"pixel_values_videos": pixels[None]}, len(images) * 2 * 2 + 1
    limits = json.loads((checkpoint / "video_preprocessor_config.json").read_text())
    processor = Qwen2VLImageProcessorPil(min_pixels=limits["min_pixels"], max_pixels=limits["max_pixels"])
    pairs = [(images[start], images[min(start + 1, len(images) - 1)]) for start in range(0, len(images), 2)]
    patches = []
    for pair in pairs:
        first, second = (processor(image, return_tensors="pt") for image in pair)
        # Patches hold channels, then frames; an image stands for both.
        halves = [each["pixel_values"].unflatten(1, (3, 2, -1)) for each in (first, second)]
        patches.append(torch.stack([halves[0][:, :, 0], halves[1][:, :, 1]], 2).flatten(1))
    grid = first["image_grid_thw"].clone()
    grid[0, 0] = len(pairs)
    given = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": grid, "second_per_grid_ts": [2 / video.fps]}
    return given, int(grid.prod()) // 4


def ask_transformers(
    checkpoint: Path, reference: LlavaReference, video: Video, token_ids: np.ndarray
) -> tuple[list[int], torch.Tensor, dict[str, Any]]:
    """Return the answer of transformers, the ids with a placeholder for each visual token, and what else it took."""
    given, count = as_transformers_takes_it(checkpoint, reference, video)
    config = reference.model.config
    repeats = np.ones(len(token_ids), np.int64)
    repeats[token_ids == config.video_token_id] = count
    ids = torch.from_numpy(np.repeat(token_ids, repeats))[None]
    if config.model_type == "qwen2_5_vl":
        given["mm_token_type_ids"] = 2 * (ids == config.video_token_id).int()
    with torch.no_grad():
        output = reference.model.generate(
            **given, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    said: list[int] = output[0, ids.shape[1] :].tolist()
    return (said[:-1] if said[-1] == 2 else said), ids, given


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_unpruned_answer_is_that_of_transformers(
    count: int, checkpoint: Path, fused: Pipeline, split: Pipeline, reference: LlavaReference
) -> None:
    # No longer than its sides: transformers lets text go on behind the longer side of a video, even where its time has
    # gone further, see test_text_goes_on_behind_a_long_video.
    video = clip_of(count, fps=8.0)
    prompt = whole(fused, video)
    assert prompt.visual_tokens_kept == prompt.visual_tokens_before
    expected, _, _ = ask_transformers(checkpoint, reference, video, prompt.prompt.token_ids)
    assert expected
    assert greedy(fused, prompt) == expected
    np.testing.assert_allclose(whole(split, video).inputs_embeds, prompt.inputs_embeds, rtol=0, atol=1e-5)


def test_rows_and_positions_are_those_of_transformers(
    checkpoint: Path, fused: Pipeline, reference: LlavaReference
) -> None:
    """Time passes by steps, here fewer than moments: 1.5 for each two frames, rounded down for each moment."""
    video = clip_of(6, fps=2 * fused.bundle.manifest.video.steps_per_second / 1.5 or 1.0)
    prompt = whole(fused, video)
    _, ids, given = ask_transformers(checkpoint, reference, video, prompt.prompt.token_ids)
    if reference.model.config.model_type == "llava_onevision":
        np.testing.assert_array_equal(prompt.positions, np.arange(ids.shape[1]))
        return
    positions, _ = reference.model.model.get_rope_index(
        ids,
        given["mm_token_type_ids"],
        video_grid_thw=given["video_grid_thw"],
        second_per_grid_ts=given["second_per_grid_ts"],
    )
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].T.numpy())
    assert len(set(prompt.positions[prompt.prompt.image_positions[0] :, 0].tolist())) > 1


def test_text_goes_on_behind_a_long_video(qwen_bundle: Path) -> None:
    """Behind the largest position of the video, which may be its time (arXiv 2409.12191)."""
    video = clip_of(6, fps=0.1)  # moments 20 s apart
    with Pipeline.open(qwen_bundle, precision="fp32", llm=None) as vlm:
        prompt = whole(vlm, video)
        steps = int(vlm.bundle.manifest.video.steps_per_second * 20)
    start = prompt.prompt.image_positions[0]
    count = prompt.visual_tokens_before
    per_moment = count // 3
    assert prompt.positions[start : start + count : per_moment, 0].tolist() == [start, start + steps, start + 2 * steps]
    assert prompt.positions[start + count].tolist() == [start + 2 * steps + 1] * 3


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("budget", [7, 9, 20])
def test_pruned_answer_is_that_of_transformers_with_the_same_embeddings(
    budget: int, positions: Any, fused: Pipeline, split: Pipeline, reference: LlavaReference
) -> None:
    """Its rows are some of the unpruned prompt's, at their places."""
    video = clip_of(7, fps=4.0)
    prompt = fused.encode([Request([video], QUESTION)], budget=budget, positions=positions)[0]
    assert prompt.visual_tokens_kept == min(budget, prompt.visual_tokens_before)
    assert greedy(fused, prompt) == reference.generate(prompt.inputs_embeds, NEW_TOKENS, positions=prompt.positions)
    unpruned = whole(fused, video).images[0]
    (kept,) = prompt.images
    np.testing.assert_allclose(kept.rows, unpruned.rows[kept.places], rtol=0, atol=1e-5)
    apart = split.encode([Request([video], QUESTION)], budget=budget, positions=positions)[0]
    np.testing.assert_array_equal(apart.indices[0], kept.indices)


def test_the_budget_is_divided_over_moments(fused: Pipeline) -> None:
    step = fused.bundle.manifest.video.frames_per_moment
    video = clip_of(3 * step)
    kept = fused.encode([Request([video], QUESTION)], budget=8)[0].images[0]
    assert sorted(kept.kept_per_grid) == [2, 3, 3]
    assert len(kept.indices) == 8
    usual = fused.encode([Request([video], QUESTION)])[0]
    assert usual.visual_tokens_kept == max(3, round(usual.visual_tokens_before * 2 / 9))


@pytest.mark.parametrize("selector", ["flashvlm", None])
def test_relevant_moments_keep_more(selector: str | None, split: Pipeline) -> None:
    """By half of the budget; relevance as torch's selection computes it, of all moments as if they were one image."""
    step = split.bundle.manifest.video.frames_per_moment
    video, budget = clip_of(4 * step, size=(140, 84)), 12
    prompt = split.encode([Request([video], QUESTION)], budget=budget, division="relevance", selector=selector)[0]
    unpruned = whole(split, video).images[0]
    tokens = torch.from_numpy(unpruned.tokens).double()
    text = torch.from_numpy(split.embeddings.lookup(prompt.prompt.text_ids("prompt"))).double()
    config = get_selector("flashvlm").make_config(split.bundle.manifest.selection.config)
    cosine = torch.nn.functional.cosine_similarity(tokens[:, None], text[None], dim=-1)
    if config.weigh_text:
        cosine = cosine * (text.norm(dim=-1) / text.norm(dim=-1).max())
    alike = (torch.softmax(cosine / config.relevance_temperature, -1) * cosine).sum(-1)
    mass = torch.softmax(alike / config.sharpening_temperature, 0).unflatten(0, (4, -1)).sum(1)
    per_moment = unpruned.layout.num_tokens // 4
    expected = divided(budget, (mass + 0.25).tolist(), [per_moment] * 4)
    kept = prompt.images[0].kept_per_grid
    assert kept == expected
    assert kept[int(mass.argmax())] == max(kept) > budget // 4


def test_relevance_weighs_text_as_the_selection_does() -> None:
    """A long word beside a short one: with weights, what is like the long one has nearly all."""
    long, short = 10 * np.eye(3)[:1], np.eye(3)[1:2]
    text = np.concatenate([long, short])
    even = relevance([long, short], text, FlashVLMConfig())
    np.testing.assert_allclose(even, [0.5, 0.5], atol=1e-9)
    weighed = relevance([long, short], text, FlashVLMConfig(weigh_text=True))
    assert weighed[0] > 0.999
    milder = relevance([long, short], text, FlashVLMConfig(weigh_text=True, sharpening_temperature=10.0))
    assert 0.5 < milder[0] < 0.6


def test_scores_and_views_go_by_moment(fused: Pipeline) -> None:
    """Those of a video whose first half is one picture and whose second half is another."""
    step = fused.bundle.manifest.video.frames_per_moment
    video = Video([frame(0)] * step + [frame(1)] * step)
    kept = fused.encode([Request([video], QUESTION)], budget=6)[0].images[0]
    parts = np.split(kept.scores, 2)
    for number, part in enumerate(parts):
        alone = fused.encode([Request([Video([frame(number)] * step)], QUESTION)], budget=3)[0].images[0]
        np.testing.assert_allclose(part, alone.scores, rtol=0, atol=1e-5)
    assert [np.asarray(view)[0, 0].tolist() for view in fused.views(video)] == [
        np.asarray(frame(number))[0, 0].tolist() for number in range(2)
    ]


def test_a_frame_is_not_taken_for_an_image(bundle: Path) -> None:
    """The same picture, once as an image and once as a frame: encoded twice, since they differ in tokens."""
    with Pipeline.open(bundle, precision="fp32", selectors=[]) as vlm:
        shown = frame(0, (300, 200))
        image = vlm.encode([Request([shown], QUESTION)], budget=2)[0]
        video = vlm.encode([Request([Video([shown])], QUESTION)], budget=2)[0]
        assert vlm.images.stats.images == 2
    assert image.visual_tokens_before != video.visual_tokens_before


def test_division_by_relevance_needs_what_shows_it(fused: Pipeline) -> None:
    with pytest.raises(UsageError, match="does not show in the fused graph"):
        fused.ask(clip_of(2), QUESTION, division="relevance")
    with pytest.raises(ConfigError, match="unknown division"):
        Pruning(division="fairly")  # type: ignore[arg-type]  # what no type checker lets through


def test_a_new_frame_is_all_that_is_encoded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest six frames of a stream, asked about after each: the others are remembered."""
    with Pipeline.open(bundle, precision="fp32", selectors=[]) as vlm:
        step = vlm.bundle.manifest.video.frames_per_moment
        window, encoded = FrameWindow(6, 4.0, step), []
        encode = vlm.session.encode

        def counted(images: Sequence[Any]) -> Any:
            encoded.append(len(images))
            return encode(images)

        monkeypatch.setattr(vlm.session, "encode", counted)
        for number in range(10):
            video = window.push(frame(number))
            prompt = vlm.encode([Request([video], QUESTION)], budget=12)[0]
        assert encoded == [1] * 10
        with Pipeline.open(bundle, precision="fp32", selectors=[], llm=None) as fresh:
            again = fresh.encode([Request([video], QUESTION)], budget=12)[0]
        np.testing.assert_array_equal(again.indices[0], prompt.indices[0])
        np.testing.assert_allclose(again.inputs_embeds, prompt.inputs_embeds, rtol=0, atol=1e-5)


def test_images_and_videos_in_one_prompt(fused: Pipeline, reference: LlavaReference) -> None:
    """Each stands where the template puts its kind, whatever the order in which they are given."""
    video, image = clip_of(3, fps=4.0), picture((60, 50))
    assert fused.encode([Request([video, image], QUESTION)], budget=fused.visual_tokens + 1)[0].prompt.media
    first = fused.encode([Request([video, image], QUESTION)], budget=4)[0]
    second = fused.encode([Request([image, video], QUESTION)], budget=4)[0]
    assert sorted(first.prompt.media) == ["image", "video"]
    for prompt in (first, second):
        for medium, kept in zip(prompt.prompt.media, prompt.images, strict=True):
            assert (medium == "video") == bool(kept.layout.times)
        assert greedy(fused, prompt) == reference.generate(prompt.inputs_embeds, NEW_TOKENS, positions=prompt.positions)


def test_a_conversation_keeps_what_it_saw(split: Pipeline) -> None:
    chat = Chat(split, Pruning(6))
    params = SamplingParams(max_new_tokens=4)
    first = chat.ask(QUESTION, [clip_of(3)], params=params)
    second = chat.ask("And then?", params=params)
    assert second.prompt.images[0] is first.prompt.images[0]
    seen = first.prompt.images[0]
    for budget in (0, "x"):
        with pytest.raises(BudgetError):  # also of an image that comes after it
            split.encode([Request([seen, picture((60, 50))], QUESTION)], budget=budget)
    assert second.prompt.prompt.media == ("video",)


def test_a_prompt_with_a_video_survives_its_file(fused: Pipeline, tmp_path: Path) -> None:
    prompt = fused.encode([Request([clip_of(3)], QUESTION)], budget=6)[0]
    write_prompt(tmp_path / "prompt.safetensors", prompt, fused.bundle, text_span="prompt")
    file = read_prompt(tmp_path / "prompt.safetensors")
    ((start, end),) = file.record.image_spans
    np.testing.assert_array_equal(file.inputs_embeds[start:end], prompt.images[0].rows)
    np.testing.assert_array_equal(file.positions, prompt.positions)
    assert (file.token_ids[start:end] == fused.bundle.manifest.prompt.video_token_id).all()


def test_a_budget_below_one_for_each_moment_is_refused(fused: Pipeline) -> None:
    step = fused.bundle.manifest.video.frames_per_moment
    with pytest.raises(BudgetError, match="too small for the video") as caught:
        fused.encode([Request([clip_of(5 * step)], QUESTION)], budget=4)
    assert "its 5 moments" in str(caught.value.expected)
    assert fused.encode([Request([clip_of(5 * step)], QUESTION)], budget=5)[0].images[0].kept_per_grid == [1] * 5


def test_what_does_not_fit_is_refused(fused: Pipeline) -> None:
    if fused.bundle.manifest.dims.windows is not None:  # else all frames are scaled to one size
        for sizes in ([(112, 84), (84, 112)], [(112, 84), (112, 84), (84, 56)]):  # within a moment, and between two
            with pytest.raises(VideoError, match="differ in size"):
                fused.encode([Request([Video([frame(0, size) for size in sizes])], QUESTION)])
    most = fused.llm.limits.max_positions
    with pytest.raises(LLMError, match="too long for the language model"):
        fused.ask(clip_of(600, size=(28, 28)), QUESTION, budget=most)
    few = clip_of(2 * fused.bundle.manifest.video.frames_per_moment)
    fused.encode([Request([few], QUESTION)], budget=2 * fused.visual_tokens)  # more than there are
    for budget, message in ((2 * fused.visual_tokens + 1, "tokens of 2 moments"), ("x", "not a whole number")):
        with pytest.raises(BudgetError, match=message):
            fused.encode([Request([few], QUESTION)], budget=budget)
    with pytest.raises(PromptError, match="video placeholders do not match"):
        fused.encode([Request([clip_of(2)], "no placeholder", raw=True)])


def test_run_on_a_file(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "clip.mkv", [frame(n) for n in range(8)], [n / 4 for n in range(8)], "ffv1")
    drawn = tmp_path / "kept.png"
    command = ["run", str(bundle), "--video", str(path), "--prompt", QUESTION, "--max-tokens", "3", "--json"]
    assert main([*command, "--frames", "4", "--budget", "9", "--heatmap", str(drawn)]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert (answer["video"], answer["frames"], answer["fps"]) == (str(path), 4, 2.0)
    assert sum(answer["kept_per_moment"]) == answer["kept_tokens"] == 9
    with Image.open(drawn) as sheet:
        assert sheet.height > 400 * len(answer["kept_per_moment"])
    assert main([*command, "--fps", "2", "--division", "relevance", "--selector", "flashvlm"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["frames"] == 4
    prompt_file = tmp_path / "prompt.safetensors"
    wanted = ["prompt", str(bundle), "--video", str(path), "--prompt", QUESTION, "--frames", "4", "--budget", "9"]
    assert main([*wanted, "--output", str(prompt_file)]) == 0
    assert main(["run", str(bundle), "--pruned", str(prompt_file), "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answer"] == answer["answer"]
    chatted = ["chat", str(bundle), "--video", str(path), "--frames", "4", "--budget", "9", "--prompt", QUESTION]
    assert main([*chatted, "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["answer"] == answer["answer"]


def test_options_of_videos_need_one(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--frames", "3"], ["--fps", "1"], ["--division", "relevance"]):
        for verb in ("run", "chat"):
            assert main([verb, str(bundle), "--image", "photo.jpg", "--prompt", "x", *option]) == 2
            assert "there is no video" in capsys.readouterr().err
        assert main(["run", str(bundle), "--pruned", "prompt.safetensors", *option]) == 2
        assert "expected: --pruned without them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("total", "weights", "most", "expected"),
    [
        (3, [1, 1, 1], [5, 5, 5], [1, 1, 1]),
        (8, [1, 1, 1], [5, 5, 5], [3, 3, 2]),
        (15, [1, 0, 0], [5, 5, 5], [5, 5, 5]),
        (9, [1, 0, 0], [5, 5, 5], [5, 2, 2]),
        (12, [3, 2, 1], [9, 9, 9], [6, 4, 2]),
        (7, [0, 0], [3, 9], [3, 4]),
    ],
)
def test_a_total_is_divided_by_weight_within_bounds(
    total: int, weights: list[float], most: list[int], expected: list[int]
) -> None:
    assert divided(total, weights, most) == expected


def test_without_text_all_moments_are_alike() -> None:
    moments = [np.eye(3), 2 * np.eye(3)]
    np.testing.assert_array_equal(relevance(moments, np.empty((0, 3)), FlashVLMConfig()), [0.5, 0.5])
    # Of two moments of orthogonal tokens the one with the text's own direction has it all.
    shares = relevance([np.eye(3)[:1], np.eye(3)[1:2]], np.eye(3)[:1], FlashVLMConfig())
    assert shares[0] > 0.999


def test_a_model_without_videos_says_so(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_bundle), "--video", "nothing.mp4", "--prompt", "x"]) == 2
    assert "takes no videos" in capsys.readouterr().err
    with Pipeline.open(tiny_bundle, llm=None) as vlm:
        assert vlm.bundle.manifest.video is None
        with pytest.raises(UsageError, match="takes no videos"):
            vlm.encode([Request([clip_of(2)], QUESTION)])


def test_settings_for_frames_come_from_the_processor_too(
    qwen_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Newer checkpoints keep them in ``processor_config.json``; more pixels than TensorRT can sort are said."""
    copied = Path(shutil.copytree(qwen_checkpoint, tmp_path / "copied"))
    (copied / "video_preprocessor_config.json").unlink()
    frames = {"size": {"shortest_edge": 784, "longest_edge": 784 * 5000}, "image_mean": [0.5, 0.5, 0.5]}
    (copied / "processor_config.json").write_text(json.dumps({"video_processor": frames}))
    path = tmp_path / "bundle"
    command = ["export", str(copied), "--output", str(path), "--decoder", "none", "--engine-check", "off"]
    assert main([*command, "--precision", "fp32"]) == 0
    most = Bundle.open(path).manifest.dims.num_patches
    assert f"frames of more than {most} visual tokens" in capsys.readouterr().err
    settings = decode_preprocessor((path / "video_preprocessor.json").read_bytes())
    assert settings.pixel_range == (28, 784, 784 * most)
    assert settings.mean == (0.5, 0.5, 0.5)
