"""An adapter outside of the package: a toy family with one convolution for a vision tower.

docs/adding-a-model.md walks through it; ``tests/integration/test_outside_adapter.py`` installs and exports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig

from flashvlm_export.errors import CheckpointError
from flashvlm_export.models.adapter import Adapter, structured
from flashvlm_export.specs import VisualDims


class ToyConfig(PreTrainedConfig):
    """``config.json`` of the family."""

    model_type = "toy_vlm"
    tie_word_embeddings = False
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig}

    def __init__(self, text_config: Mapping[str, Any] | None = None, **fields: Any) -> None:
        self.text_config = LlamaConfig(**(text_config or {}))
        super().__init__(**fields)


class ToyAdapter(Adapter):
    """Adapter for ``model_type: toy_vlm``."""

    family = "toy_vlm"
    embedding_key = "model.embed_tokens.weight"
    default_chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %} {% endfor %}"
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        side, patch = config["image_size"], config["patch_size"]
        if side % patch:
            raise CheckpointError(
                "patches do not fill the image", received=f"{side} and {patch} pixels", expected="a multiple"
            )
        self.config = ToyConfig.from_dict(dict(config))
        self.text_config = self.config.text_config
        self.image_token_id = config["image_token_id"]
        width = self.text_config.hidden_size
        self.dims = VisualDims(side, patch, (side // patch) ** 2, config["vision_width"], width)

    def encoder(self, *, needs_saliency: bool) -> nn.Module:
        """Return :class:`ToyEncoder` on the meta device."""
        with torch.device("meta"):
            return ToyEncoder(self.dims, needs_saliency).eval()

    @property
    def default_processor(self) -> dict[str, Any]:
        """CLIP's steps at the model's image size."""
        side = self.dims.image_size
        return {"size": {"height": side, "width": side}, "do_center_crop": False}

    def vision_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return seeded pictures."""
        return (structured(torch.rand(batch, 3, self.dims.image_size, self.dims.image_size)),)

    @staticmethod
    def text_key(name: str) -> str:
        """Return ``name``: the language model is not nested."""
        return name


class ToyEncoder(nn.Module):
    """A convolution, a projector; saliency is the length of a patch's feature."""

    def __init__(self, dims: VisualDims, needs_saliency: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dims.vision_width, dims.patch_size, dims.patch_size)
        self.projector = nn.Linear(dims.vision_width, dims.llm_width)
        self.needs_saliency = needs_saliency

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters without copying them."""
        self.load_state_dict(dict(tensors), strict=True, assign=True)
        self.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return features ``[B,N,C]``, saliency float32 ``[B,N]`` or ``None``, and visual tokens ``[B,N,D]``."""
        features = self.patches(pixel_values.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        saliency = features.float().norm(dim=-1) if self.needs_saliency else None
        return features, saliency, self.projector(features)
