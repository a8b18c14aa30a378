"""The language side of a checkpoint: the embedding table, and the decoder's weights one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from flashvlm_export.export.checkpoint import WeightSource
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.progress import Progress

_ROWS_AT_ONCE = 4096


def write_text_embeddings(path: Path, adapter: Adapter, weights: WeightSource) -> None:
    """Write the LLM's input embeddings ``[vocab, D]`` as ``.npy`` in their own precision.

    bfloat16, which NumPy lacks, becomes float32: float16 would lose its small values.
    """
    shape = (adapter.vocab_size, adapter.dims.llm_width)
    table = weights.read(adapter.embedding_key, shape)
    dtype = np.float16 if table.dtype == torch.float16 else np.float32
    # Not through a memory map: on a full disk that ends the process with a bus error.
    with path.open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, shape[0], _ROWS_AT_ONCE):
            rows = table[start : start + _ROWS_AT_ONCE]
            stream.write((rows if dtype == np.float16 else rows.float()).numpy().tobytes())


def write_newline(path: Path, adapter: Adapter, weights: WeightSource) -> None:
    """Write the embedding ``[D]`` that ends a line of tiles as ``.npy``, float32, where the model has one."""
    if adapter.newline_key is not None:
        np.save(path, weights.read(adapter.newline_key, (adapter.dims.llm_width,)).float().numpy())


def text_model_tensors(adapter: Adapter, weights: WeightSource, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name in the causal LM's state dict, tensor)``; names and shapes come from transformers' own class.

    Without ``lm_head.weight`` where the output layer is the embedding table. As in transformers, the checkpoint's
    top-level ``tie_word_embeddings`` decides; the text configuration's only where there is no ``lm_head`` at all.
    """
    stored = "lm_head.weight" in weights.names()
    tied = adapter.config.tie_word_embeddings or (adapter.text_config.tie_word_embeddings and not stored)
    for name, parameter in progress.track(_text_parameters(adapter), "tensors"):
        if not (tied and name == "lm_head.weight"):
            yield name, weights.read(adapter.text_key(name), tuple(parameter.shape))


def count_text_parameters(adapter: Adapter) -> int:
    """Return the number of the language model's weights, embeddings and output layer included."""
    return sum(parameter.numel() for _, parameter in _text_parameters(adapter))


def _text_parameters(adapter: Adapter) -> list[tuple[str, Parameter]]:
    config = copy.deepcopy(adapter.text_config)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(config).named_parameters())
