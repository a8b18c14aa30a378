"""An adapter of another package, found by its entry point: the example that docs/adding-a-model.md walks through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from helpers.tiny_llava import make_config, make_tokenizer
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, LlamaForCausalLM

from flashvlm_export.bundle import Bundle
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Request

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapter"


def install(directory: Path) -> Path:
    """Write what pip leaves of a package with the example's entry point; its module stays where it is."""
    info = directory / "toy_vlm-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-vlm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flashvlm_export.adapters]\ntoy_vlm = toy_vlm:ToyAdapter\n")
    return directory


def make_toy(directory: Path) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """Write a seeded checkpoint; return its language model and the tensors of its vision tower."""
    torch.manual_seed(0)
    text = make_config().text_config
    llama = LlamaForCausalLM(text).eval()
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 / (1 if "embed_tokens" in name else parameter.shape[1]) ** 0.5)
    vision = {
        "patches.weight": torch.randn(24, 3, 14, 14) * 0.05,
        "patches.bias": torch.randn(24) * 0.1,
        "projector.weight": torch.randn(64, 24) * 0.2,
        "projector.bias": torch.randn(64) * 0.1,
    }
    directory.mkdir()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None  # the adapter has one
    tokenizer.save_pretrained(directory)
    save_file(
        {**{name: t.detach().clone() for name, t in llama.state_dict().items()}, **vision},
        directory / "model.safetensors",
    )
    config = {
        "model_type": "toy_vlm",
        "image_size": 56,
        "patch_size": 14,
        "vision_width": 24,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "text_config": text.to_dict(),
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False).save_pretrained(directory)
    return llama, vision


def test_a_family_of_another_package_is_exported_and_answers(tmp_path: Path) -> None:
    llama, vision = make_toy(tmp_path / "checkpoint")
    paths = os.pathsep.join([str(install(tmp_path / "site")), str(EXAMPLE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "flashvlm_export", "export", str(tmp_path / "checkpoint"), "--precision", "fp32"]
    command += ["--output", str(tmp_path / "bundle"), "--decoder", "fp32", "--engine-check", "off"]
    without = subprocess.run(command, capture_output=True, text=True, check=False)
    assert without.returncode == 1
    assert "'toy_vlm'" in without.stderr
    assert "docs/adding-a-model.md" in without.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / "bundle", verify=True).manifest
    assert (manifest.source.family, manifest.dims.num_patches) == ("toy_vlm", 16)

    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    with Pipeline.open(tmp_path / "bundle") as vlm:
        prompt = vlm.encode([Request([image], "What is it?")], budget=16)[0]
        answer = vlm.answer(prompt, SamplingParams(max_new_tokens=12))
        pixels = CLIPImageProcessorPil.from_pretrained(tmp_path / "checkpoint")(image, return_tensors="pt")
        features = torch.nn.functional.conv2d(
            pixels["pixel_values"], vision["patches.weight"], vision["patches.bias"], stride=14
        )
        tokens = torch.nn.functional.linear(
            features.flatten(2).transpose(1, 2), vision["projector.weight"], vision["projector.bias"]
        )
        ids = torch.from_numpy(prompt.prompt.token_ids)
        place = prompt.prompt.image_positions[0]
        rows = llama.model.embed_tokens(ids)[None]
        rows = torch.cat([rows[:, :place], tokens, rows[:, place + 1 :]], dim=1)
        with torch.no_grad():
            said = llama.generate(inputs_embeds=rows, max_new_tokens=12, do_sample=False)[0].tolist()
    assert answer.token_ids == (said[:-1] if said[-1] == 2 else said)
    assert len(answer.token_ids) > 2
