"""Text weights → ONNX decoder that takes prompt embeddings, through onnxruntime-genai's model builder.

The builder reads a Hugging Face directory, so the weights pass through a temporary one on the bundle's disk. It runs in
a process of its own: it prints to stdout, puts modules named ``builders`` and ``loaders`` on the import path, and keeps
the whole model in memory; none of that survives it.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from flashvlm_export.errors import (
    CheckpointError,
    ConfigError,
    DependencyError,
    ExportError,
    StorageError,
    install_hint,
)
from flashvlm_export.export.child import run_child
from flashvlm_export.export.decoder_positions import POSITION_IDS, take_positions
from flashvlm_export.export.head_padding import HEAD_SIZE_MULTIPLE, PADDABLE, head_size, pad_heads
from flashvlm_export.files import require_free_space, storage_errors
from flashvlm_export.manifest import DecoderEntry

DecoderPrecision = Literal["fp32", "fp16", "int8", "int4"]

MODEL = "model.onnx"
_SHARD_BYTES = 2 << 30

# By ``model_type`` of the text config: the causal LM it belongs to. Each was compared with transformers, with prompt
# embeddings instead of token ids; families that scale embeddings (Gemma) or need 3-D positions (Qwen-VL) are not here.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# With builder 0.18, "linear" gives other logits than transformers, without a word; the rest was not compared.
_ROPE_TYPES = ("default", "llama3")

# For fp16 on "cpu" the builder writes MultiHeadAttention, whose KV cache is copied at every token; with "cuda" it
# writes GroupQueryAttention, which updates the cache in place and which ONNX Runtime has for both devices.
_EXECUTION_PROVIDER = {"fp32": "cpu", "fp16": "cuda", "int8": "cpu", "int4": "cpu"}

# int8 and int4: a byte or half of one, and one float32 scale per block of 32.
_BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int8": 1.125, "int4": 0.625}

# ``prune_lm_head``: only the last position's logits leave the graph, [batch, 1, vocab]. A generator needs no others,
# and the rest would be a few per cent of the prefill's work and, at 640 tokens and a vocabulary of 152 000, 390 MB. The
# price: a right-padded batch finds the padding's logits there.
# ``fuse_qk_norm_gqa``: where the norm of queries and keys goes into the attention, the rotation could not be taken out.
_BUILDER_OPTIONS = ("exclude_embeds=true", "prune_lm_head=true", "fuse_qk_norm_gqa=false")

# The builder asks for a tokenizer only to copy it; the bundle keeps the real one.
_TOKENIZER = {
    "tokenizer.json": {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
    },
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
}


def export_decoder(
    text_config: PreTrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    precision: str,
    position_sections: Sequence[int] = (),
) -> DecoderEntry:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``directory``; nothing else stays on disk.

    Args:
        text_config: the language model's part of the checkpoint's configuration; not changed.
        tensors: names as in the causal LM's state dict (``model.layers.0.…``) with their weights, read one at a time;
            at most 2 GiB, or one tensor if that is larger, are held here. The builder holds them all. Without
            ``lm_head.weight`` the output layer shares the embedding table.
        directory: a folder of the bundle; made if it is not there.
        precision: ``fp32``, ``fp16`` (inputs and KV cache too; meant for CUDA, runs on a CPU), ``int8`` or ``int4``
            (weights in blocks of 32, the rest float32; for CPUs).
        position_sections: rotary frequencies that turn by time, row and column (M-RoPE, arXiv 2409.12191): positions
            then have three numbers.

    Returns:
        The manifest's entry; ``file`` is relative to the parent of ``directory``.

    Raises:
        ConfigError: unknown precision.
        DependencyError: onnxruntime-genai or onnx-ir is not installed.
        ExportError: this decoder has no ONNX form here (known before any weight is read), or the builder failed.
        CheckpointError: ``tensors`` are not exactly those of the model that ``text_config`` describes.
        StorageError: the disk is full, or cannot be written to.
    """
    if precision not in get_args(DecoderPrecision):
        raise ConfigError(
            "unknown decoder precision", received=precision, expected=f"one of {', '.join(get_args(DecoderPrecision))}"
        )
    require_exportable(text_config)
    config, tensors = pad_heads(_causal_lm_config(text_config), tensors)
    entry = DecoderEntry(
        file=f"{directory.name}/{MODEL}",
        precision=precision,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        max_positions=config.max_position_embeddings,
    )
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Beside the target rather than in /tmp, which is often memory, and so that the result is renamed, not copied.
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
            checkpoint, built = Path(temporary, "checkpoint"), Path(temporary, "built")
            checkpoint.mkdir()
            elements = _write_checkpoint(checkpoint, config, tensors)
            require_free_space(directory, int(elements * _BYTES_PER_WEIGHT[precision]))
            _run_builder(checkpoint, built, precision)
            take_positions(built / MODEL, entry.head_size, position_sections)
            _check_graph(built / MODEL, config, entry)
            for name in (f"{MODEL}.data", MODEL):
                (built / name).replace(directory / name)
    return entry


def require_exportable(text_config: PreTrainedConfig) -> None:
    """Raise what :func:`export_decoder` raises before it reads a weight, so that it is known before other work."""
    _require_builder()
    _causal_lm_config(text_config)


def _require_builder() -> None:
    missing = [name for name in ("onnxruntime_genai", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            "exporting the language model needs onnxruntime-genai's model builder",
            received=f"not installed: {', '.join(missing)}",
            hint=f"{install_hint('llm')}; or leave the decoder out: --decoder none",
        )


def _causal_lm_config(text_config: PreTrainedConfig) -> Any:
    """Return a copy of ``text_config`` as the builder wants it; raise :class:`ExportError` if it cannot serve."""
    hint = "export with --decoder none and run the language model in another engine"
    if text_config.model_type not in _ARCHITECTURES:
        raise ExportError(
            "this language model cannot be exported as an ONNX decoder",
            received=f"text model of type '{text_config.model_type}'",
            expected=f"one of {', '.join(_ARCHITECTURES)}",
            hint=hint,
        )
    config: Any = type(text_config).from_dict(text_config.to_dict())
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ExportError(
            "the model builder cannot be trusted with this kind of rotary position embedding",
            received=f"rope type '{rope_type}'",
            expected=f"one of {', '.join(_ROPE_TYPES)}",
            hint=hint,
        )
    if head_size(config) % HEAD_SIZE_MULTIPLE and config.model_type not in PADDABLE:
        raise ExportError(
            "ONNX Runtime's attention cannot take heads of this size",
            received=f"head size {head_size(config)} in a model of type '{config.model_type}'",
            expected=f"a multiple of {HEAD_SIZE_MULTIPLE}, or a model of type {', '.join(PADDABLE)}",
            hint=hint,
        )
    config.architectures = [_ARCHITECTURES[config.model_type]]
    _drop_sliding_window(config)
    if config.eos_token_id is None:
        config.eos_token_id = 0  # the builder wants one for a file that is thrown away
    return config


def _drop_sliding_window(config: Any) -> None:
    """Make every layer attend to everything, up to the length where a window would begin to hide something.

    The builder's windowed layers either ignore the window or want a cache that is a ring; up to that length, full
    attention is the same and exact.
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        return
    config.max_position_embeddings = min(config.max_position_embeddings, window)
    config.sliding_window = None
    if getattr(config, "use_sliding_window", None):
        config.use_sliding_window = False
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight of the model; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_checkpoint(directory: Path, config: Any, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write a Hugging Face checkpoint; return its number of elements.

    Names and shapes are checked because transformers fills what is missing with random numbers and only warns.
    """
    expected = _expected_shapes(config)
    dtype: torch.dtype | None = None
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    shard_bytes = elements = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        try:
            save_file(shard, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise StorageError(
                "the text weights cannot be laid out for the model builder",
                received=f"{error} while writing {directory}",
                expected="a disk with room for a second copy of them",
            ) from error
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue  # a constant that older checkpoints stored
        if name in weight_map or name in shard or name not in expected:
            raise CheckpointError(
                "a text weight has no place in the model",
                received=name + (" (twice)" if name in expected else ""),
                expected=f"the weights of {config.architectures[0]}, each once",
            )
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"tensor '{name}' has the wrong shape",
                received=list(tensor.shape),
                expected=f"{list(expected[name])}, from the text configuration",
            )
        if shard and shard_bytes + tensor.nbytes > _SHARD_BYTES:
            flush()
            shard_bytes = 0
        shard[name] = _own_storage(tensor)
        shard_bytes += tensor.nbytes
        elements += tensor.numel()
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    if shard:
        flush()

    tied = "lm_head.weight" not in weight_map
    missing = sorted(expected.keys() - weight_map.keys() - ({"lm_head.weight"} if tied else set()))
    if missing:
        raise CheckpointError(
            "the checkpoint lacks weights of the language model",
            received=f"{len(missing)} missing: {', '.join(missing[:5])}" + (", …" if len(missing) > 5 else ""),
            expected=f"all {len(expected)} weights of {config.architectures[0]}",
            hint="download the checkpoint again",
        )
    config.tie_word_embeddings = tied
    config.dtype = dtype  # transformers converts to what is written here while it loads
    config.save_pretrained(directory)
    index = {"metadata": {}, "weight_map": weight_map}
    for file, content in {"model.safetensors.index.json": index, **_TOKENIZER}.items():
        (directory / file).write_text(json.dumps(content), encoding="utf-8")
    return elements


def _own_storage(tensor: Tensor) -> Tensor:
    """Return ``tensor`` contiguous and sharing memory with no other, as safetensors demands."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _run_builder(checkpoint: Path, built: Path, precision: str) -> None:
    done = run_child(
        "onnxruntime_genai.models.builder",
        *("--input", checkpoint, "--output", built, "--precision", precision),
        *("--execution_provider", _EXECUTION_PROVIDER[precision], "--cache_dir", checkpoint.parent / "cache"),
        *("--extra_options", *_BUILDER_OPTIONS),
        cwd=checkpoint.parent,
        env={
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # No repository: it writes the commit of the one that it is installed in into the model.
            "GIT_DIR": str(checkpoint),
        },
    )
    if done.returncode == 0 and (built / MODEL).is_file():
        return
    killed = done.returncode < 0
    raise ExportError(
        "onnxruntime-genai's model builder failed",
        received=done.tail,
        expected=f"a decoder in {precision}",
        hint="the builder holds all text weights in memory: free some, or use a machine with more"
        if killed
        else "pip install --upgrade onnxruntime-genai, or export with --decoder none",
    )


def _check_graph(file: Path, config: Any, entry: DecoderEntry) -> None:
    """Raise :class:`ExportError` unless the graph takes embeddings and has the KV cache that ``entry`` states."""
    graph = onnx.load(str(file), load_external_data=False).graph
    shapes = {
        value.name: [cast(int, dim.dim_value) for dim in value.type.tensor_type.shape.dim] for value in graph.input
    }
    width = shapes.get("inputs_embeds", [0])[-1]
    caches = [shape for name, shape in shapes.items() if name.startswith("past_key_values.")]
    heads = {shape[1] for shape in caches}
    if (
        width != config.hidden_size
        or POSITION_IDS not in shapes
        or len(caches) != 2 * entry.num_layers
        or heads != {entry.num_kv_heads}
    ):
        raise ExportError(
            "the model builder wrote another decoder than was asked for",
            received=f"inputs {', '.join(f'{name}{shape}' for name, shape in shapes.items())}",
            expected=f"position_ids, inputs_embeds of width {config.hidden_size} and {entry.num_layers} layers of KV "
            f"cache with {entry.num_kv_heads} heads",
            hint="pip install --upgrade onnxruntime-genai",
        )
