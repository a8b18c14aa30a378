"""Tiny seeded LLaVA checkpoints in the layout that transformers itself writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

# Rows and columns of tiles that LLaVA-NeXT's checkpoints know.
RESOLUTIONS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# 9 visual tokens of a picture, as odd a grid as that of the released checkpoints.
ONEVISION_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
    "vision_use_head": False,
}
ONEVISION_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 321,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CORPUS = [
    "USER: what is in this picture? ASSISTANT: a cat, a rocket, a cup of coffee and an astronaut on the moon.",
    "the quick brown fox jumps over the lazy dog while 0123456789 people read the sign by the river",
    "Is there a flower? Where is the temple? How many coins are on the table? Describe the colour of the cup.",
]


def make_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Llama's habits: BOS in front, byte decoding, ``<image>`` and ``<pad>`` added last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_talkative_llama(width: int) -> LlamaForCausalLM:
    """A seeded Llama with weights so large that greedy answers vary."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(llm_width=width).text_config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 / (1 if "embed_tokens" in name else parameter.shape[1]) ** 0.5)
    return model


def make_config(
    *, image_size: int = 56, vision_width: int = 32, llm_width: int = 64, vocab_size: int = 320, **overrides: Any
) -> LlavaConfig:
    """16 visual tokens by default (56 px, patches of 14 px); 336 px gives LLaVA-1.5's 576."""
    return LlavaConfig(
        vision_config=overrides.pop("vision_config", None)
        or CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=2 * vision_width,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=14,
            projection_dim=vision_width,
        ),
        text_config=overrides.pop("text_config", None)
        or LlamaConfig(
            hidden_size=llm_width,
            intermediate_size=2 * llm_width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,  # the smallest that vLLM runs on a CPU
            vocab_size=vocab_size,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=overrides.pop("image_token_index", vocab_size - 1),
        image_seq_length=(image_size // 14) ** 2,
        **overrides,
    )


def make_tiny_llava(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, family: str = "llava", **options: Any
) -> Path:
    """Write a seeded random checkpoint with tokenizer, chat template and image processor; return ``directory``.

    ``family`` is ``llava``, ``llava_next``, whose tiles have the model's image size, or ``llava_onevision``.
    """
    tokenizer = make_tokenizer(options.get("vocab_size", 320))
    options["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    if family == "llava_onevision":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
        tokenizer.chat_template = ONEVISION_TEMPLATE
        options.setdefault("vision_config", SiglipVisionConfig(**ONEVISION_TOWER))
        options.setdefault("text_config", Qwen2Config(**ONEVISION_TEXT))
    shard_size = options.pop("max_shard_size", "5GB")
    config: Any = make_config(**options)
    size = config.vision_config.image_size
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    model_class: Any = LlavaForConditionalGeneration
    if family == "llava_next":
        resolutions = [[size * rows, size * columns] for rows, columns in RESOLUTIONS]
        fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = LlavaNextConfig.from_dict({**fields, "image_grid_pinpoints": resolutions})
        tiles = LlavaNextImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_grid_pinpoints=resolutions,
        )
        processor = LlavaNextProcessor(
            tiles,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
        model_class = LlavaNextForConditionalGeneration
    if family == "llava_onevision":
        resolutions = [[size * rows, size * columns] for rows in range(1, 7) for columns in range(1, 7)]
        config = LlavaOnevisionConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_index,
            video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=resolutions,
        )
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": size, "width": size}, image_grid_pinpoints=resolutions, image_mean=[0.5] * 3
        )
        model_class = LlavaOnevisionForConditionalGeneration
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers' default of 0.02 gives answers of one repeated token; this gives lively ones.
            if parameter.ndim > 1 and "norm" not in name:
                fan_in = parameter[0].numel() if "embed_tokens" not in name else 1
                parameter.normal_(0, 1.2 / fan_in**0.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    tokenizer.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def main() -> None:
    """Write a checkpoint from the command line, for the demo and for tests in environments without torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--image-size", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=("llava", "llava_next", "llava_onevision"), default="llava")
    args = parser.parse_args()
    make_tiny_llava(args.directory, seed=args.seed, image_size=args.image_size, family=args.family)


if __name__ == "__main__":
    main()
