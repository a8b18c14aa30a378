"""The language model of a LLaVA checkpoint alone, as ``docs/llm-engines.md`` tells users to make it, in float32."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration


def write_text_checkpoint(checkpoint: Path, directory: Path) -> Path:
    """Write the text model of ``checkpoint`` with its tokenizer to ``directory`` and return it."""
    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    text = AutoModelForCausalLM.from_config(llava.config.text_config, dtype=torch.float32)
    text.model.load_state_dict(llava.model.language_model.state_dict())
    text.lm_head.load_state_dict(llava.lm_head.state_dict())
    text.save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path)
    write_text_checkpoint(**vars(parser.parse_args()))
