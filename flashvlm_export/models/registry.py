"""Names of models and of the architectures they belong to. Adapters are imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashvlm_export.errors import CheckpointError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from flashvlm_export.models.adapter import Adapter


@dataclass(frozen=True)
class ModelEntry:
    """One model that users can name.

    Attributes:
        name: what users type.
        repo: Hugging Face hub id of the checkpoint; or its folder in this repository, beginning with ``./``.
        family: key of :data:`FAMILIES`, equal to ``model_type`` in the checkpoint's ``config.json``.
        visual_tokens: visual tokens of one image before pruning, at most.
        parameters: of the whole model, in billions.
        config: ``config.json`` content for ``--weights random``; what is left out is the config class's default.
    """

    name: str
    repo: str
    family: str
    visual_tokens: int
    parameters: float
    config: Mapping[str, Any]


# ViT-L/14 of CLIP at 336 pixels, which all of them have.
_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
_VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_MISTRAL_7B = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}


def _llava(name: str, family: str, parameters: float, text: Mapping[str, Any]) -> ModelEntry:
    return ModelEntry(
        name=name,
        repo=f"llava-hf/{name}-hf",
        family=family,
        visual_tokens=576 if family == "llava" else 5 * 576,
        parameters=parameters,
        config={
            "model_type": family,
            "image_token_index": 32000,
            "vision_config": _CLIP_L_336,
            "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, **text},
        },
    )


def _onevision(size: str, parameters: float, **text: Any) -> ModelEntry:
    return ModelEntry(
        name=f"llava-onevision-{size}",
        repo=f"llava-hf/llava-onevision-qwen2-{size}-ov-hf",
        family="llava_onevision",
        visual_tokens=3375,
        parameters=parameters,
        config={
            "model_type": "llava_onevision",
            "image_token_index": 151646,
            "video_token_index": 151647,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "text_config": {
                "model_type": "qwen2",
                "max_position_embeddings": 32768,
                "rope_theta": 1000000.0,
                **text,
            },
        },
    )


def _qwen25_vl(size: str, parameters: float, **text: Any) -> ModelEntry:
    return ModelEntry(
        name=f"qwen2.5-vl-{size}",
        repo=f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct",
        family="qwen2_5_vl",
        visual_tokens=3840,
        parameters=parameters,
        config={
            "model_type": "qwen2_5_vl",
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "out_hidden_size": text["hidden_size"],
            },
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                "max_position_embeddings": 128000,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1000000.0,
                    "mrope_section": [16, 24, 24],
                },
                **text,
            },
        },
    )


_TINY = ModelEntry(
    name="flashvlm-tiny",
    repo="./benchmarks/tiny/checkpoint",
    family="llava",
    visual_tokens=576,
    parameters=0.0048,
    config={
        "model_type": "llava",
        "image_token_index": 4,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 336,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 180,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
        },
    },
)

MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        _TINY,
        _llava("llava-1.5-7b", "llava", 7.06, _VICUNA_7B),
        _llava("llava-1.5-13b", "llava", 13.35, _VICUNA_13B),
        _llava("llava-v1.6-vicuna-7b", "llava_next", 7.06, _VICUNA_7B),
        _llava("llava-v1.6-vicuna-13b", "llava_next", 13.35, _VICUNA_13B),
        _llava("llava-v1.6-mistral-7b", "llava_next", 7.57, _MISTRAL_7B),
        _onevision(
            "0.5b",
            0.89,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=152000,
            tie_word_embeddings=True,
        ),
        _onevision(
            "7b",
            8.03,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152128,
        ),
        _qwen25_vl(
            "3b",
            3.75,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        _qwen25_vl(
            "7b",
            8.29,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
    )
}


@dataclass(frozen=True)
class Family:
    """One architecture that is exported.

    Attributes:
        adapter: ``module:Class``.
        takes: what its questions can be about.
        state: how far it has been shown to work, for people.
    """

    adapter: str
    takes: str
    state: str


_ON_TINY = "equals transformers token by token on seeded tiny checkpoints; its engines compile at full size"

FAMILIES: dict[str, Family] = {
    "llava": Family(
        "flashvlm_export.models.llava:LlavaAdapter",
        "images",
        "equals transformers token by token on flashvlm-tiny, which was trained, and on seeded tiny checkpoints; its "
        "engines compile at full size",
    ),
    "llava_next": Family("flashvlm_export.models.llava:LlavaNextAdapter", "images", _ON_TINY),
    "llava_onevision": Family("flashvlm_export.models.llava:LlavaOnevisionAdapter", "images, videos", _ON_TINY),
    "qwen2_5_vl": Family("flashvlm_export.models.qwen2_5_vl:Qwen25VLAdapter", "images, videos", _ON_TINY),
}

# Architectures that are easily taken for one of these, and what they would need.
_NEAR = {
    "qwen2_vl": "Qwen2-VL: every block of its vision tower attends to whole images, with other norms than Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL: features of several vision layers go into layers of its language model (DeepStack)",
    "qwen3_vl_moe": "Qwen3-VL: features of several vision layers go into layers of its language model (DeepStack)",
    "qwen2_5_omni": "Qwen2.5-Omni: its Thinker holds a Qwen2.5-VL beside its audio tower, under other names",
    "llavaonevision1_5": "LLaVA-OneVision-1.5: its vision tower is RICE-ViT and its language model Qwen3",
    "llava_next_video": "LLaVA-NeXT-Video: it pools frames as LLaVA-NeXT, whose images alone are supported, does not",
    "video_llava": "Video-LLaVA: it has a vision tower of its own for videos",
    "vipllava": "ViP-LLaVA: its projector takes features of several vision layers",
    "llava_llama": "a checkpoint in the layout of LLaVA's authors: take the one that was converted, of llava-hf",
    "llava_mistral": "a checkpoint in the layout of LLaVA's authors: take the one that was converted, of llava-hf",
    "llava_qwen": "a checkpoint in the layout of LLaVA's authors: take the one that was converted, of llava-hf",
}


#: Adapters of other packages announce themselves here: name = ``model_type``, value = ``module:Class``.
ENTRY_POINTS = "flashvlm_export.adapters"


def find_model(name: str) -> ModelEntry | None:
    """Return the registry row for a model name or hub id, or ``None``."""
    return next((entry for entry in MODELS.values() if name in (entry.name, entry.repo)), None)


def outside_families() -> dict[str, EntryPoint]:
    """Return the adapters that other packages announce, by ``model_type``; none is imported."""
    from importlib.metadata import entry_points  # 20 ms, for those who only look models up

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def adapter_class(model_type: str) -> type[Adapter]:
    """Return the adapter for ``model_type`` of a ``config.json`` (imports torch).

    Raises:
        CheckpointError: if no adapter exports this architecture.
    """
    outside = outside_families()
    family = FAMILIES.get(model_type)
    if family is None and model_type in outside:
        try:
            found: type[Adapter] = outside[model_type].load()
            return found
        except Exception as error:  # another package's import: it may raise anything
            raise CheckpointError(
                f"the adapter for {model_type!r} of another package cannot be loaded",
                received=f"{outside[model_type].value}: {type(error).__name__}: {error}",
                expected=f"an entry point of {ENTRY_POINTS} that imports",
            ) from error
    if family is None:
        near = f" ({_NEAR[model_type]})" if model_type in _NEAR else ""
        raise CheckpointError(
            "this architecture is not supported yet",
            received=f"model_type {model_type!r}{near}",
            expected=f"one of {', '.join([*FAMILIES, *outside])}",
            hint="flashvlm models lists what can be exported; docs/adding-a-model.md tells how to add one",
        )
    module, _, attribute = family.adapter.partition(":")
    adapter: type[Adapter] = getattr(importlib.import_module(module), attribute)
    return adapter
