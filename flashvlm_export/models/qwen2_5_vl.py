"""Qwen2.5-VL: a vision transformer with attention in windows, at the image's own resolution (arXiv 2502.13923)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2Config
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel, rotate_half

from flashvlm_export.errors import CheckpointError
from flashvlm_export.manifest import VideoSettings
from flashvlm_export.models.adapter import MOST_TOKENS, Adapter, structured
from flashvlm_export.models.saliency import attention_received
from flashvlm_export.specs import VisualDims, WindowDims
from flashvlm_export.windows import in_windows

_MASKED = -6e4  # finite in float16, so that a window without any patch gives numbers, which nobody reads


class Qwen25VLAdapter(Adapter):
    """Adapter for ``model_type: qwen2_5_vl``."""

    family = "qwen2_5_vl"
    selection_defaults: ClassVar[Mapping[str, Any]] = {"weigh_text": True}
    # Qwen's own checkpoints and those that transformers has saved since 4.52.
    renames = (
        (r"^model\.(?=visual|language_model)", ""),
        (r"^model\.(?=embed_tokens|layers|norm)", "language_model."),
    )
    embedding_key = "language_model.embed_tokens.weight"
    default_chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
        "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = Qwen2_5_VLConfig.from_dict(dict(config))
        vision, text = self.config.vision_config, self.config.text_config
        unit = vision.patch_size * vision.spatial_merge_size
        if vision.window_size % unit or vision.depth - 1 not in vision.fullatt_block_indexes:
            raise CheckpointError(
                "this vision tower is not one of Qwen2.5-VL",
                received=f"window_size {vision.window_size}, fullatt_block_indexes {vision.fullatt_block_indexes}",
                expected=f"windows of a multiple of {unit} pixels, and a last block that attends to the whole image",
            )
        if vision.out_hidden_size != text.hidden_size:
            raise CheckpointError(
                "vision tower and language model differ in width",
                received=f"out_hidden_size {vision.out_hidden_size}",
                expected=f"{text.hidden_size}, the hidden_size of text_config",
            )
        self.dims = VisualDims(
            image_size=0,
            patch_size=vision.patch_size,
            num_patches=MOST_TOKENS,
            vision_width=text.hidden_size,
            llm_width=text.hidden_size,
            windows=WindowDims(
                vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, vision.window_size // unit
            ),
        )
        self.image_token_id, self.video_token_id = self.config.image_token_id, self.config.video_token_id
        self.video = VideoSettings(
            frames_per_moment=vision.temporal_patch_size, steps_per_second=float(vision.tokens_per_second)
        )
        # The language model is Qwen2's but for what its positions are.
        fields = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        rotation = {key: value for key, value in text.rope_parameters.items() if key != "mrope_section"}
        self.text_config = Qwen2Config.from_dict({**fields, "rope_parameters": rotation})
        self.position_sections = tuple(text.rope_parameters["mrope_section"])

    def encoder(self, *, needs_saliency: bool) -> nn.Module:
        """Return :class:`Qwen25VLEncoder` on the meta device."""
        with torch.device("meta"):
            encoder = Qwen25VLEncoder(self.config.vision_config, needs_saliency)
        return encoder.eval()

    @property
    def default_processor(self) -> dict[str, Any]:
        """Qwen2-VL's settings for this vision tower."""
        vision = self.config.vision_config
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }

    @property
    def default_video_processor(self) -> dict[str, Any]:
        """The same, with Qwen2-VL's least and most pixels of a frame."""
        size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
        return {**self.default_processor, "size": size}

    @property
    def sample_patches(self) -> int:
        """Visual tokens of an image of six by five."""
        return 30

    def vision_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return images of six by five visual tokens, every other one of three by ten, which has fewer windows."""
        dims = self.dims.windows
        assert dims is not None
        unit = dims.patch_size * dims.merge_size
        images = []
        for number in range(batch):
            rows, columns = (6, 5) if number % 2 == 0 else (3, 10)
            noise = structured(torch.rand(1, 3, rows * unit, columns * unit))
            images.append(in_windows(noise.numpy(), dims))
        most = max(len(image.patches) for image in images)
        stacked = [
            np.stack([np.pad(part, ((0, most - len(part)), *((0, 0),) * (part.ndim - 1))) for part in parts])
            for parts in zip(*((image.patches, image.positions, image.mask) for image in images), strict=True)
        ]
        layout = np.stack([image.order + number * most * dims.window_tokens for number, image in enumerate(images)])
        return (*map(torch.from_numpy, stacked), torch.from_numpy(layout))


class Qwen25VLEncoder(nn.Module):
    """Vision tower with merger over windows of equal size; visual tokens are patch features too.

    Saliency is the attention that each patch receives in the last block, which attends to the whole image: summed over
    queries, mean over heads and over the patches of a visual token (the authors' variant of FlashVLM).
    """

    def __init__(self, config: Any, needs_saliency: bool) -> None:
        super().__init__()
        self.visual: Any = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
        self.full = frozenset(config.fullatt_block_indexes)
        self.merge = config.spatial_merge_size**2
        self.needs_saliency = needs_saliency

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters (named as this module names them) without copying them."""
        self.load_state_dict(dict(tensors), strict=True, assign=True)
        rotary = self.visual.rotary_pos_emb
        # A buffer that checkpoints do not carry.
        rotary.inv_freq, _ = rotary.compute_axial_rope_parameters(rotary.config)
        self.requires_grad_(False)

    def forward(
        self, pixel_values: Tensor, patch_positions: Tensor, patch_mask: Tensor, layout: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ``(patch_features [B,N,D], saliency float32 [B,N] or None, visual_tokens [B,N,D])``.

        Args:
            pixel_values: ``[B, W, P, V]``, patches by window.
            patch_positions: int64 ``[B, W, P, 2]``.
            patch_mask: bool ``[B, W, P]``.
            layout: int64 ``[B, N]``: which tokens of all windows of all images are those of each image.
        """
        tower = self.visual
        weight = tower.patch_embed.proj.weight.flatten(1)
        hidden = nn.functional.linear(pixel_values.to(weight.dtype), weight)
        angles = (patch_positions[..., None].float() * tower.rotary_pos_emb.inv_freq).flatten(-2)
        turn = torch.cat([angles, angles], dim=-1)[..., None, :]
        bias = torch.where(patch_mask, 0.0, _MASKED).to(weight.dtype)
        saliency = None
        for number, block in enumerate(tower.blocks):
            query, key, value = _heads(block, hidden, turn)
            rows = 1 if number in self.full else 2  # one sequence per image, or per window
            mask = bias.flatten(0, rows - 1).flatten(1)[:, None, None, :]
            query, key, value = (
                part.flatten(0, rows - 1).flatten(1, -3).transpose(1, 2) for part in (query, key, value)
            )
            if number == len(tower.blocks) - 1 and self.needs_saliency:
                saliency = attention_received(query, key, block.attn.scaling, mask, patch_mask.flatten(1))
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=block.attn.scaling)
            hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(hidden.shape))
            hidden = hidden + block.mlp(block.norm2(hidden))
        units = tower.merger.ln_q(hidden).flatten(0, 2).reshape(-1, self.merge * hidden.shape[-1])
        tokens = tower.merger.mlp(units)[layout]
        if saliency is not None:
            saliency = saliency.reshape(-1, self.merge).mean(-1)[layout]
        return tokens, saliency, tokens


def _heads(block: Any, hidden: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys (both turned by their positions, in float32) and values ``[B, W, P, heads, width]``."""
    attention = block.attn
    parts = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = parts.unbind(-3)
    cos, sin = turn.cos(), turn.sin()
    query, key = (part.float() * cos + rotate_half(part.float()) * sin for part in (query, key))
    return query.to(value.dtype), key.to(value.dtype), value
