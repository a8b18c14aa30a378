"""The language model of a Llama checkpoint as a GGUF file in float32, as llama.cpp's own converter would write it.

Without a tokenizer, which an engine that is given embeddings and token ids does not use.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(checkpoint: Path, file: Path) -> Path:
    """Write the text model of ``checkpoint`` to ``file`` and return it."""
    from gguf import GGUFWriter

    config = AutoConfig.from_pretrained(checkpoint)
    kind = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    model = kind.from_pretrained(checkpoint, dtype=torch.float32)
    text = config.get_text_config()
    assert text.model_type == "llama"
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_file_type(0)  # everything in float32
    writer.add_tokenizer_model("none")
    decoder = model.get_decoder()
    tensors = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    tensors["lm_head.weight"] = model.lm_head.weight.detach()
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        array = tensor.numpy().astype(np.float32)
        if stem in _WHOLE:
            target = _WHOLE[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{_LAYER[part]}"
        if target.endswith(("attn_q", "attn_k")):
            # Hugging Face rotates halves, GGUF neighbours.
            array = array.reshape(-1, 2, head // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    write_gguf(**vars(parser.parse_args()))
