"""LLaVA-1.5: CLIP ViT up to one hidden layer, a two-layer projector, a Llama-type LLM (arXiv 2310.03744)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from optimum.utils import DummyVisionInputGenerator, NormalizedTextAndVisionConfig
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from flashvlm_export.errors import CheckpointError
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.specs import VisualDims

_NormalizedLlava = NormalizedTextAndVisionConfig.with_args(text_config="text_config", vision_config="vision_config")

# llava-hf checkpoints before transformers 4.52, after it, and since CLIPVisionModel lost its inner module.
_RENAMES = (
    (re.compile(r"^model\.(?=language_model|vision_tower|multi_modal_projector)"), ""),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)


class LlavaAdapter(Adapter):
    """Adapter for ``model_type: llava`` with a CLIP vision tower and one ``vision_feature_layer``."""

    family = "llava"
    embedding_key = "language_model.embed_tokens.weight"
    # The prompt LLaVA-1.5 was trained with, without a system text, as its converted checkpoints use it.
    default_chat_template = (
        "{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = LlavaConfig.from_dict(dict(config))
        vision = self.config.vision_config
        if vision.model_type != "clip_vision_model":
            raise CheckpointError(
                "LLaVA with this vision tower is not supported yet: it has no CLS token to take saliency from",
                received=vision.model_type,
                expected="clip_vision_model",
            )
        if self.config.vision_feature_select_strategy != "default":
            raise CheckpointError(
                "this vision_feature_select_strategy is not supported",
                received=self.config.vision_feature_select_strategy,
                expected="default (CLS removed)",
            )
        self.layers = _layers_to_run(self.config.vision_feature_layer, vision.num_hidden_layers)
        self._normalized = _NormalizedLlava(self.config)
        side = self._normalized.image_size // vision.patch_size
        self.dims = VisualDims(
            image_size=self._normalized.image_size,
            patch_size=vision.patch_size,
            num_patches=side * side,
            vision_width=vision.hidden_size,
            llm_width=self._normalized.hidden_size,
        )
        self.image_token_id = self.config.image_token_index

    def encoder(self, *, needs_saliency: bool) -> nn.Module:
        """Return :class:`LlavaEncoder` on the meta device."""
        with torch.device("meta"):
            encoder = LlavaEncoder(self.config, self.layers, needs_saliency)
        return encoder.eval()

    def noise(self, batch: int) -> Tensor:
        """Return what optimum's generator makes for this vision tower."""
        generator: Any = DummyVisionInputGenerator("image-text-to-text", self._normalized, batch_size=batch)
        noise: Tensor = generator.generate("pixel_values", framework="pt")
        return noise

    @staticmethod
    def canonical(key: str) -> str:
        """Map every known spelling to ``vision_tower.…``, ``multi_modal_projector.…`` and ``language_model.…``."""
        for pattern, replacement in _RENAMES:
            key = pattern.sub(replacement, key)
        return key

    @staticmethod
    def text_key(name: str) -> str:
        """Map Llama's ``model.…`` to ``language_model.…``; ``lm_head`` keeps its name."""
        return re.sub(r"^model\.", "language_model.", name)


class LlavaEncoder(nn.Module):
    """Vision tower up to the feature layer, one CLS attention row, projector: each computed once."""

    def __init__(self, config: Any, layers: int, needs_saliency: bool) -> None:
        super().__init__()
        vision_config = type(config.vision_config)(**{**config.vision_config.to_dict(), "num_hidden_layers": layers})
        vision_config._attn_implementation = "sdpa"
        tower: Any = CLIPVisionModel(vision_config)
        # Comes after the feature layer; only pooling would use it.
        tower.post_layernorm = nn.Identity()
        self.vision_tower = tower
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.needs_saliency = needs_saliency

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters (named as this module names them) without copying them."""
        self.load_state_dict(dict(tensors), strict=True, assign=True)
        embeddings: Any = self.vision_tower.embeddings
        # A buffer that checkpoints do not carry.
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)
        self.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ``(patch_features [B,N,C], saliency float32 [B,N] or None, visual_tokens [B,N,D])``."""
        tower = self.vision_tower
        dtype = tower.pre_layrnorm.weight.dtype
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(dtype)))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        last = tower.encoder.layers[-1]
        saliency = cls_attention(last, hidden) if self.needs_saliency else None
        features = last(hidden, None)[:, 1:]
        return features, saliency, self.multi_modal_projector(features)


def cls_attention(layer: Any, hidden: Tensor) -> Tensor:
    """Return the CLS query's attention to every patch in ``layer``, mean over heads: float32 ``[B,N]``.

    The keys are those that the layer computes anyway; graph optimisers merge the two.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    batch, length, _ = normed.shape
    heads, width = attention.num_heads, attention.head_dim
    query = attention.q_proj(normed[:, :1]).float().view(batch, 1, heads, width).transpose(1, 2)
    keys = attention.k_proj(normed).float().view(batch, length, heads, width).transpose(1, 2)
    weights = torch.softmax(query @ keys.transpose(2, 3) * attention.scale, dim=-1)
    return weights[:, :, 0, 1:].mean(1)


def _layers_to_run(feature_layer: int | list[int], num_layers: int) -> int:
    """Return how many encoder layers lie at or below ``vision_feature_layer`` (an index into all hidden states)."""
    if not isinstance(feature_layer, int):
        raise CheckpointError(
            "features from several layers are not supported",
            received=f"vision_feature_layer {feature_layer}",
            expected="one layer, such as -2",
        )
    count = feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer
    if not 1 <= count <= num_layers:
        raise CheckpointError(
            "vision_feature_layer points outside of the encoder",
            received=f"vision_feature_layer {feature_layer} of {num_layers} layers",
            expected=f"{-num_layers} to -1, or 1 to {num_layers}",
        )
    return count
