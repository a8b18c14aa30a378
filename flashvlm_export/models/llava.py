"""LLaVA-1.5 and LLaVA-NeXT: CLIP ViT up to one hidden layer, a two-layer projector, a Llama-type LLM.

LLaVA-1.5 (arXiv 2310.03744) sees an image as one picture, LLaVA-NeXT as an overview and tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from optimum.utils import DummyVisionInputGenerator, NormalizedTextAndVisionConfig
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaConfig, LlavaNextConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from flashvlm_export.errors import CheckpointError
from flashvlm_export.models.adapter import Adapter, structured
from flashvlm_export.specs import VisualDims

_NormalizedLlava = NormalizedTextAndVisionConfig.with_args(text_config="text_config", vision_config="vision_config")


class LlavaAdapter(Adapter):
    """Adapter for ``model_type: llava`` with a CLIP vision tower and one ``vision_feature_layer``."""

    family = "llava"
    config_class: ClassVar[Any] = LlavaConfig
    # llava-hf checkpoints before transformers 4.52, after it, and since CLIPVisionModel lost its inner module.
    renames = (
        (r"^model\.(?=language_model|vision_tower|multi_modal_projector|image_newline)", ""),
        (r"^language_model\.model\.", "language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    )
    embedding_key = "language_model.embed_tokens.weight"
    # The prompt LLaVA-1.5 was trained with, without a system text, as its converted checkpoints use it.
    default_chat_template = (
        "{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = self.config_class.from_dict(dict(config))
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
        self.text_config = self.config.text_config

    def encoder(self, *, needs_saliency: bool) -> nn.Module:
        """Return :class:`LlavaEncoder` on the meta device."""
        with torch.device("meta"):
            encoder = LlavaEncoder(self.config, self.layers, needs_saliency)
        return encoder.eval()

    @property
    def default_processor(self) -> dict[str, Any]:
        """CLIP's settings for the model's image size."""
        size = self.dims.image_size
        return {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}

    def vision_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return pictures made of what optimum's generator gives for this vision tower."""
        generator: Any = DummyVisionInputGenerator("image-text-to-text", self._normalized, batch_size=batch)
        return (structured(generator.generate("pixel_values", framework="pt")),)


class LlavaNextAdapter(LlavaAdapter):
    """Adapter for ``model_type: llava_next``: tiles go through the encoder as a batch of pictures."""

    family = "llava_next"
    config_class = LlavaNextConfig
    newline_key = "image_newline"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        side = self.dims.image_size
        tiles = [self._tiles(*resolution) for resolution in self.config.image_grid_pinpoints]
        if not tiles or any(height % side or width % side for height, width in self.config.image_grid_pinpoints):
            raise CheckpointError(
                "the resolutions of image_grid_pinpoints are not made of tiles",
                received=self.config.image_grid_pinpoints,
                expected=f"at least one [height, width], multiples of {side}",
            )
        most = 1 + max(rows * columns for rows, columns in tiles)
        self.dims = replace(self.dims, num_patches=most * self.dims.num_patches, most_tiles=most)

    @property
    def default_processor(self) -> dict[str, Any]:
        """The same, with the model's resolutions."""
        return {
            **super().default_processor,
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": self.config.image_grid_pinpoints,
        }

    @property
    def sample_patches(self) -> int:
        """Visual tokens of an overview and one tile that lost a line above and one below."""
        rows, columns = self.dims.grid
        return rows * columns + max(rows - 2, 1) * columns

    def vision_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return for each image an overview and a tile, and their layout."""
        rows, columns = self.dims.grid
        border = columns if rows > 2 else 0
        one = torch.cat([torch.arange(rows * columns), torch.arange(rows * columns + border, 2 * rows * columns)])
        first = 2 * rows * columns * torch.arange(batch)
        return *super().vision_inputs(2 * batch), first[:, None] + one[: self.sample_patches]

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        return height // self.dims.image_size, width // self.dims.image_size


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

    def forward(self, pixel_values: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ``(patch_features [B,N,C], saliency float32 [B,N] or None, visual_tokens [B,N,D])``.

        With ``layout`` int64 ``[B,N]`` these are the patches of all pictures that it names; saliency is that within a
        picture, each of which has its own CLS token.
        """
        tower = self.vision_tower
        dtype = tower.pre_layrnorm.weight.dtype
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(dtype)))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        last = tower.encoder.layers[-1]
        saliency = cls_attention(last, hidden) if self.needs_saliency else None
        features = last(hidden, None)[:, 1:]
        tokens = self.multi_modal_projector(features)
        if layout is None:
            return features, saliency, tokens
        ordered = None if saliency is None else saliency.flatten()[layout]
        return features.flatten(0, 1)[layout], ordered, tokens.flatten(0, 1)[layout]


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
