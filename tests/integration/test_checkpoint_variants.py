"""Legal checkpoints of other shapes through the whole way: their answers are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from helpers.tiny_llava import make_tiny_llava
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, Qwen2Config

from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint
from flashvlm_export.export.reference import make_reference
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Request
from flashvlm_export.specs import Precision

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def combined_processor_file(directory: Path) -> None:
    """What processors of transformers 5 write: the image processor inside of processor_config.json."""
    image_processor = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": image_processor}))
    (directory / "generation_config.json").unlink()


def template_in_json(directory: Path) -> None:
    """What llava-hf checkpoints carry: chat_template.json beside the tokenizer; here also a list of end tokens."""
    template = directory / "chat_template.jinja"
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))


def stale_index(directory: Path) -> None:
    """A save in one file over an older one in shards; transformers reads the single file."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))


def names_since_4_52(directory: Path) -> None:
    """What transformers 4.52 to 4.57 saved: one ``model.`` in front of every part, the output layer outside."""
    renamed = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        new = f"model.{name}".replace("language_model.model.", "language_model.")
        renamed[new.replace("model.language_model.lm_head.", "lm_head.")] = tensor
    assert {"model.image_newline", "lm_head.weight", "model.language_model.embed_tokens.weight"} < renamed.keys()
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


VARIANTS = [
    pytest.param(
        {"text_config": Qwen2Config(**TEXT, tie_word_embeddings=True), "tie_word_embeddings": True},
        combined_processor_file,
        id="qwen2-tied-combined-processor",
    ),
    pytest.param(
        {
            "text_config": MistralConfig(**{**TEXT, "num_attention_heads": 8}, tie_word_embeddings=True),
            "multimodal_projector_bias": False,
            "vision_feature_layer": -1,
            "image_size": 61,
        },
        template_in_json,
        id="mistral-untied-above-narrow-heads-no-bias-last-layer-odd-size",
    ),
    pytest.param(
        {"family": "llava_next", "text_config": MistralConfig(**TEXT), "dtype": torch.float16},
        names_since_4_52,
        id="llava-next-mistral-names-since-4.52",
    ),
    pytest.param({"dtype": torch.bfloat16, "vision_feature_layer": 2}, stale_index, id="bfloat16-layer-2-stale-index"),
]


@pytest.mark.parametrize(("options", "prepare"), VARIANTS)
def test_answers_are_those_of_transformers(options: dict, prepare: Callable[[Path], None], tmp_path: Path) -> None:
    checkpoint = make_tiny_llava(tmp_path / "checkpoint", seed=3, **options)
    prepare(checkpoint)
    bundle = bundle_from_checkpoint(
        ExportSettings(
            model=str(checkpoint),
            output=tmp_path / "bundle",
            precisions=[Precision.FP32],
            decoder="fp32",
            engine_check="off",
        )
    )
    reference = make_reference(checkpoint)
    image = load_image(skimage.data.coffee())
    with Pipeline.open(bundle) as pipeline:
        prompt = pipeline.encode([Request([image], "What is in the cup?")], budget=pipeline.visual_tokens)[0]
        params = SamplingParams(max_new_tokens=24)
        expected = reference.generate_unpruned(
            prompt.prompt.token_ids, pipeline.preprocess([image]), params.max_new_tokens, [image.size]
        )
        answer = pipeline.answer(prompt, params)
        assert answer.token_ids == expected
        assert len(answer.token_ids) > 2
        pruned = pipeline.encode([Request([image], "What is in the cup?")], budget=5)[0]
        assert pipeline.answer(pruned, params).token_ids == reference.generate(
            pruned.inputs_embeds, params.max_new_tokens, positions=pruned.positions
        )
    assert np.isfinite(answer.prompt.inputs_embeds).all()
