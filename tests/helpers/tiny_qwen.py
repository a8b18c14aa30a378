"""Tiny seeded Qwen2.5-VL checkpoints in the layout that transformers itself writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from helpers.tiny_llava import make_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_tiny_qwen(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any) -> Path:
    """Write a seeded random checkpoint with tokenizer, chat template and image processor; return ``directory``.

    Blocks 1 and 3 of the vision tower attend to the whole image; images have 4 to 60 visual tokens, long ones to 109.
    """
    tokenizer = make_tokenizer(320)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
        },
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 328,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            **text,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As for LLaVA: transformers' default of 0.02 gives answers of one repeated token.
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 1.2 / (parameter[0].numel() if "embed_tokens" not in name else 1) ** 0.5)
    model.generation_config.eos_token_id = 2
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 60).save_pretrained(directory)
    # As transformers' video processor, which needs torchvision, would write it: frames of up to 30 visual tokens.
    frames = {"video_processor_type": "Qwen2VLVideoProcessor", "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 30}
    (directory / "video_preprocessor_config.json").write_text(json.dumps(frames))
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    make_tiny_qwen(parser.parse_args().directory)
