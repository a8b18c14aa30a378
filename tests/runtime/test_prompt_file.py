"""A pruned prompt on disk: what an engine that has never heard of this package needs, and nothing that does not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.errors import PromptError, StorageError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.prompt_file import ENTRY, read_prompt, write_prompt
from flashvlm_export.runtime.request import PrunedPrompt, Request


@pytest.fixture(scope="module")
def vlm(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(tiny_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def prompt(vlm: Pipeline) -> PrunedPrompt:
    """Two images, 5 tokens each, where they stood."""
    pictures = [np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8) for seed in range(2)]
    return vlm.encode([Request(pictures, "What changed?")], budget=5, positions="original")[0]


@pytest.fixture
def file(tmp_path: Path, vlm: Pipeline, prompt: PrunedPrompt) -> Path:
    path = tmp_path / "pruned.safetensors"
    write_prompt(path, prompt, vlm.bundle, text_span="prompt")
    return path


def rewritten(file: Path, change: Any = lambda tensors: None, **record: Any) -> Path:
    """The same file with tensors or record changed, written by the library alone."""
    from safetensors import safe_open

    tensors = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = json.loads(opened.metadata()[ENTRY]) | record
    change(tensors)
    save_file(tensors, file, metadata={ENTRY: json.dumps(metadata)})
    return file


def test_what_is_read_is_what_was_written(file: Path, vlm: Pipeline, prompt: PrunedPrompt) -> None:
    have = read_prompt(file)
    np.testing.assert_array_equal(have.inputs_embeds, prompt.inputs_embeds)
    for index in range(2):
        np.testing.assert_array_equal(have.kept[index], prompt.indices[index])
        np.testing.assert_array_equal(have.scores[index], prompt.scores[index])
        start, end = have.record.image_spans[index]
        assert end - start == 5
        assert (have.token_ids[start:end] == vlm.prompts.settings.image_token_id).all()
    np.testing.assert_array_equal(have.positions, prompt.positions)
    assert have.positions[-1] == len(prompt.inputs_embeds) - 1 + 2 * (16 - 5)
    # Outside of the images, the rows are those of the embedding table.
    text = have.token_ids != vlm.prompts.settings.image_token_id
    np.testing.assert_array_equal(have.inputs_embeds[text], vlm.embeddings.lookup(have.token_ids[text]))
    assert have.token_ids[text].tolist() == np.delete(prompt.prompt.token_ids, prompt.prompt.image_positions).tolist()
    assert (have.record.budget, have.record.visual_tokens) == (5, 16)
    assert have.record.source == vlm.bundle.manifest.source
    assert have.record.selection == vlm.bundle.manifest.selection


def test_another_engine_answers_alike(file: Path, vlm: Pipeline, prompt: PrunedPrompt, tiny_checkpoint: Path) -> None:
    """transformers, given nothing but the file."""
    from flashvlm_export.export.reference import LlavaReference

    given = read_prompt(file)
    expected = LlavaReference(tiny_checkpoint).generate(given.inputs_embeds, 12, positions=given.positions)
    assert vlm.answer(prompt, SamplingParams(max_new_tokens=12)).token_ids == expected
    assert len(expected) > 3


def test_the_command_writes_and_answers_it(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    images = ["--image", str(tmp_path / "0.png")]
    output = tmp_path / "pruned.safetensors"
    asked = [*images, "--prompt", "What is it?", "--budget", "4", "--positions", "original"]
    written = ["prompt", str(tiny_bundle), *asked, "--output", str(output)]
    assert main([*written, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["budget"] == 4
    assert main(["run", str(tiny_bundle), *asked, "--max-tokens", "9", "--json"]) == 0
    direct = json.loads(capsys.readouterr().out)["answers"][0]
    assert main(["run", str(tiny_bundle), "--pruned", str(output), "--max-tokens", "9", "--json"]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert (answered["answer"], answered["prompt_tokens"]) == (direct["answer"], direct["prompt_tokens"])
    assert main([*written, "--selector", "divprune", *images, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert (record["selection"]["selector"], len(record["image_spans"])) == ("divprune", 2)

    assert main(["run", str(tiny_bundle), "--pruned", str(output), "--prompt", "What?"]) == 2
    assert "--prompt" in capsys.readouterr().err
    for option in (
        ["--budget", "4"],
        ["--visual-only"],
        ["--text-span", "question"],
        ["--positions", "original"],
        ["--selector", "divprune"],
    ):
        assert main(["run", str(tiny_bundle), "--pruned", str(output), *option]) == 2
        assert option[0] in capsys.readouterr().err
    assert main(["run", str(tiny_bundle), "--prompt", "What?"]) == 2
    assert "no --image" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(file: Path, vlm: Pipeline, tmp_path: Path) -> None:
    content = file.read_bytes()

    def fresh() -> Path:
        file.write_bytes(content)
        return file

    with pytest.raises(PromptError, match="cannot be read"):
        read_prompt(tmp_path / "none.safetensors")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompt(file)
    save_file({"x": np.zeros(1)}, file)
    with pytest.raises(PromptError, match="holds no pruned prompt"):
        read_prompt(file)
    # bfloat16, which NumPy does not know, as in many a checkpoint.
    header = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(PromptError, match="holds no pruned prompt"):
        read_prompt(file)
    with pytest.raises(PromptError, match="newer flashvlm-export"):
        read_prompt(rewritten(fresh(), schema_version=2))
    with pytest.raises(PromptError, match="damaged"):
        read_prompt(rewritten(fresh(), budget="many"))
    with pytest.raises(PromptError, match="other tensors than its record says"):
        read_prompt(rewritten(fresh(), lambda tensors: tensors.pop("kept_1")))
    with pytest.raises(PromptError, match="do not fit together"):
        read_prompt(rewritten(fresh(), image_spans=[(1, 4), (5, 10)]))
    with pytest.raises(PromptError, match="do not fit together"):
        read_prompt(rewritten(fresh(), lambda tensors: tensors.update(positions=tensors["positions"][1:])))
    for name, wrong in (
        ("inputs_embeds", np.zeros(4, np.float32)),
        ("inputs_embeds", np.zeros((4, 64), np.float16)),
        ("token_ids", np.zeros((), np.int64)),
        ("kept_0", np.zeros(5, np.float32)),
    ):
        with pytest.raises(PromptError, match="other tensors than its record says"):
            read_prompt(rewritten(fresh(), lambda tensors, name=name, wrong=wrong: tensors.update({name: wrong})))
    assert read_prompt(fresh()).record.budget == 5


def test_a_prompt_of_another_model_is_refused(
    file: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.loads((tiny_bundle / "manifest.json").read_text())["source"]
    rewritten(file, source=source | {"weights_sha256": "0" * 64})
    assert main(["run", str(tiny_bundle), "--pruned", str(file)]) == 2
    assert "made with another model" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(vlm: Pipeline, prompt: PrunedPrompt, small_disk: Path) -> None:
    path = small_disk / "pruned.safetensors"
    path.write_bytes(b"old")
    (small_disk / "filler").write_bytes(b"x" * (240 << 10))
    wide = dataclasses.replace(prompt, inputs_embeds=np.tile(prompt.inputs_embeds, (40, 1)))
    with pytest.raises(StorageError):
        write_prompt(path, wide, Bundle.open(vlm.bundle.path), text_span="prompt")
    assert path.read_bytes() == b"old"
    assert sorted(item.name for item in small_disk.iterdir()) == ["filler", "pruned.safetensors"]
