"""Engines by name, and the refusal of a language model that is not the bundle's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.errors import BundleError, LLMError, UsageError
from flashvlm_export.runtime.pipeline import Pipeline


@pytest.mark.parametrize("wanted", ["gpt", "transformers", "transformers:", "onnxruntime:x", "onnxruntime:", ""])
def test_names_that_are_none(tiny_bundle: Path, wanted: str) -> None:
    with pytest.raises(UsageError, match=r"onnxruntime, transformers:DIR, llamacpp:FILE\.gguf, vllm:URL"):
        Pipeline.open(tiny_bundle, llm=wanted)


def test_a_bundle_without_a_decoder_takes_another_engine(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(picture)
    asked = ["--image", str(picture), "--prompt", "What is it?", "--budget", "5", "--max-tokens", "9", "--json"]
    assert main(["run", str(tiny_bundle), *asked]) == 0
    own = json.loads(capsys.readouterr().out)["answers"][0]

    bare = shutil.copytree(tiny_bundle, tmp_path / "bare")
    manifest = json.loads((bare / "manifest.json").read_text())
    manifest["decoder"] = None
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("llm/")}
    (bare / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(bare / "llm")
    with pytest.raises(BundleError, match="--llm"):
        Pipeline.open(bare)
    assert main(["run", str(bare), *asked, "--llm", f"transformers:{tiny_checkpoint}"]) == 0
    other = json.loads(capsys.readouterr().out)["answers"][0]
    assert other["answer"] == own["answer"]
    assert other["new_tokens"] == own["new_tokens"] > 3
    assert set(other["stage_ms"]) == set(own["stage_ms"])


def test_another_language_model_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="makes the other one")
    from helpers.tiny_llava import make_config
    from transformers import LlamaForCausalLM

    config = make_config(llm_width=64).text_config
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "median cosine"),
        ({"eos_token_id": [7, 8]}, r"tokens \[7, 8\] end an answer"),
        ({"eos_token_id": None}, "median cosine"),
        ({"vocab_size": 328}, r"\[328, 64\]"),
        ({"hidden_size": 32}, r"\[328, 32\]"),
    ]
    for number, (change, message) in enumerate(cases):
        for name, value in change.items():
            setattr(config, name, value)
        other = tmp_path / str(number)
        LlamaForCausalLM(config).save_pretrained(other)
        pipeline = Pipeline.open(Bundle.open(tiny_bundle), llm=f"transformers:{other}")
        with pytest.raises(LLMError, match=message):
            pipeline.load()
        with pytest.raises(LLMError, match="not open"):
            _ = pipeline.llm.limits


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("llamacpp:nothing.gguf", "there is no GGUF file"),
        ("transformers:nowhere", "there is no checkpoint"),
        ("vllm:localhost:8000", "a server's address with http://"),
    ],
)
def test_an_evaluation_by_files_that_are_not_there(
    wanted: str, message: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a directory belongs to them."""
    Image.new("RGB", (60, 80)).save(tmp_path / "a.png")
    row = {"id": "a", "image": "a.png", "question": "What?", "answers": ["x"], "kind": "k", "metric": "exact"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    command = ["eval", str(tiny_bundle), "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*command, "--llm", wanted]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
