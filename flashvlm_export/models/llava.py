"""LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision: a ViT up to one hidden layer, a two-layer projector, a Llama-type LLM.

LLaVA-1.5 (arXiv 2310.03744) sees an image as one picture, LLaVA-NeXT as an overview and tiles; LLaVA-OneVision (arXiv
2408.03326) does too, with SigLIP instead of CLIP and Qwen2 instead of Llama.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from optimum.utils import DummyVisionInputGenerator, NormalizedTextAndVisionConfig
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from flashvlm_export.errors import CheckpointError
from flashvlm_export.manifest import VideoSettings
from flashvlm_export.models.adapter import MOST_TOKENS, Adapter, structured
from flashvlm_export.models.saliency import cls_attention, layer_attention_received
from flashvlm_export.specs import SHORTENED, VisualDims

_NormalizedLlava = NormalizedTextAndVisionConfig.with_args(text_config="text_config", vision_config="vision_config")


class LlavaAdapter(Adapter):
    """Adapter for ``model_type: llava`` with a CLIP vision tower and one ``vision_feature_layer``."""

    family = "llava"
    config_class: ClassVar[Any] = LlavaConfig
    vision_type: ClassVar[str] = "clip_vision_model"
    feature_strategy: ClassVar[str] = "default"  # without the CLS token
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
        if vision.model_type != self.vision_type:
            raise CheckpointError(
                f"{self.family} with this vision tower is not supported yet",
                received=vision.model_type,
                expected=self.vision_type,
            )
        if self.config.vision_feature_select_strategy != self.feature_strategy:
            raise CheckpointError(
                "this vision_feature_select_strategy is not supported",
                received=self.config.vision_feature_select_strategy,
                expected=f"{self.feature_strategy}, as {self.family} has it",
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
        kind = SiglipEncoder if self.vision_type == "siglip_vision_model" else LlavaEncoder
        with torch.device("meta"):
            encoder = kind(self.config, self.layers, needs_saliency)
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
    config_class: ClassVar[Any] = LlavaNextConfig
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


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Adapter for ``model_type: llava_onevision``: the tokens of many tiles are scaled down to those of a few."""

    family = "llava_onevision"
    config_class = LlavaOnevisionConfig
    vision_type = "siglip_vision_model"
    feature_strategy = "full"
    video = VideoSettings(shrinks=2)
    default_chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} "
        "{% for part in message['content'] if part['type'] != 'text' %}<{{ part['type'] }}>\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}"
        "{% if message['role'] == 'assistant' %}\n{% endif %}{{ part['text'] }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.video_token_id = self.config.video_token_index
        ratio = self.config.vision_aspect_ratio
        if not re.fullmatch(r"anyres_max_[1-9]\d*", ratio):
            raise CheckpointError(
                "this vision_aspect_ratio is not supported", received=ratio, expected="anyres_max_N, such as _9"
            )
        own, tile = int(ratio.removeprefix("anyres_max_")), math.prod(self.dims.grid)

        def most_patches(area: int) -> int:
            return tile + min(int(area * tile * SHORTENED**2), (self.dims.most_tiles - 1) * tile)

        area = next((area for area in range(own, 1, -1) if most_patches(area) <= MOST_TOKENS), 1)
        if area < own:
            self.notes = (
                f"the tokens of an image's tiles are scaled down to those of {area} tiles, not {own}: TensorRT sorts "
                f"at most {MOST_TOKENS}; as the checkpoint does with vision_aspect_ratio anyres_max_{area}",
            )
        self.dims = replace(self.dims, num_patches=most_patches(area), most_area=area)

    @property
    def default_processor(self) -> dict[str, Any]:
        """The same, for SigLIP."""
        side = self.dims.image_size
        return {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": side, "width": side},
            "image_grid_pinpoints": self.config.image_grid_pinpoints,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }

    def vision_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return the same pictures; each token lies between the one that it is there and the three before."""
        pictures, layout = super().vision_inputs(batch)
        neighbours = torch.stack([layout.roll(step, 1) for step in range(4)], dim=-1)
        return pictures, neighbours, torch.softmax(torch.randn(neighbours.shape), dim=-1)


class LlavaEncoder(nn.Module):
    """Vision tower up to the feature layer, one CLS attention row, projector: each computed once."""

    tower_class: ClassVar[Any] = CLIPVisionModel
    overrides: ClassVar[Mapping[str, Any]] = {}
    saliency: ClassVar[Any] = staticmethod(cls_attention)
    first_patch = 1

    def __init__(self, config: Any, layers: int, needs_saliency: bool) -> None:
        super().__init__()
        fields = {**config.vision_config.to_dict(), "num_hidden_layers": layers, **self.overrides}
        vision_config = type(config.vision_config)(**fields)
        vision_config._attn_implementation = "sdpa"
        tower: Any = self.tower_class(vision_config)
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

    def forward(
        self, pixel_values: Tensor, layout: Tensor | None = None, layout_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ``(patch_features [B,N,C], saliency float32 [B,N] or None, visual_tokens [B,N,D])``.

        With ``layout`` int64 ``[B,N]`` these are the patches of all pictures that it names; saliency is that within a
        picture. With ``layout_weights`` float32 ``[B,N,4]`` it names four patches for each, int64 ``[B,N,4]``, whose
        weighted sum counts.
        """
        tower = self.vision_tower
        embed = tower.embeddings
        hidden = self._before_layers(embed(pixel_values.to(embed.patch_embedding.weight.dtype)))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        last = tower.encoder.layers[-1]
        saliency = self.saliency(last, hidden) if self.needs_saliency else None
        features = last(hidden, None)[:, self.first_patch :]
        tokens = self.multi_modal_projector(features)
        if layout is None:
            return features, saliency, tokens

        def in_order(rows: Tensor) -> Tensor:
            rows = rows.flatten(0, 1)
            if layout_weights is None:
                return rows[layout]
            corners = zip(layout.unbind(-1), layout_weights.unbind(-1), strict=True)
            mixed = [rows[corner].float() * weight[..., None] for corner, weight in corners]
            return (mixed[0] + mixed[1] + (mixed[2] + mixed[3])).to(rows.dtype)

        ordered = None if saliency is None else in_order(saliency[..., None])[..., 0]
        return in_order(features), ordered, in_order(tokens)

    def _before_layers(self, hidden: Tensor) -> Tensor:
        return self.vision_tower.pre_layrnorm(hidden)


class SiglipEncoder(LlavaEncoder):
    """The same with SigLIP, which has no CLS token: saliency is the attention that a patch receives in the last layer.

    Summed over queries and mean over heads, as in the authors' variant of FlashVLM for another such encoder.
    """

    tower_class = SiglipVisionModel
    overrides: ClassVar[Mapping[str, Any]] = {"vision_use_head": False}
    saliency: ClassVar[Any] = staticmethod(layer_attention_received)
    first_patch = 0

    def _before_layers(self, hidden: Tensor) -> Tensor:
        return hidden


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
