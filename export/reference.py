"""The checkpoint in PyTorch, run by transformers: what every exported graph and engine is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from flashvlm_export.errors import CheckpointError
from flashvlm_export.export.checkpoint import read_config
from flashvlm_export.selection import select_tokens
from flashvlm_export.specs import Array

Size = tuple[int, int]


@dataclass(frozen=True)
class ReferenceVisual:
    """Visual side of a batch in PyTorch: ``tokens [B,K,D]``, ``indices [B,K]``, ``all_tokens [B,N,D]``, all float32."""

    tokens: Array
    indices: Array
    all_tokens: Array


class LlavaReference:
    """A LLaVA checkpoint as its users run it without this package: eager attention, every attention map, float32.

    Shares no code with the exported graph: features, saliency and projection come from transformers' own model, the
    kept indices from the NumPy definition.

    Args:
        directory: checkpoint in Hugging Face layout.
        language_attention: transformers' attention implementation for the language model; the vision tower's is eager,
            which alone gives attention maps away.
    """

    model_class: ClassVar[Any] = LlavaForConditionalGeneration

    def __init__(self, directory: Path, *, language_attention: str = "eager") -> None:
        attention = {"": "eager", "vision_config": "eager", "text_config": language_attention}
        self.model: Any = self.model_class.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        ).eval()

    def encode(self, pixel_values: Array, size: Size | None = None) -> tuple[Array, Array, Array]:
        """Return ``(patch_features [B,N,C], saliency [B,N], visual tokens before pruning [B,N,D])``, float32.

        ``size`` (width, height) is that of the image, for models that see one in tiles; the batch is then that image.
        """
        with torch.no_grad():
            parts = self._encode(torch.from_numpy(pixel_values))
        features, saliency, tokens = (part.numpy() for part in parts)
        return features, saliency, tokens

    def _encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inner = self.model.model
        layer = self.model.config.vision_feature_layer
        vision = inner.vision_tower(pixel_values, output_hidden_states=True, output_attentions=True)
        features = vision.hidden_states[layer][:, 1:]
        # hidden_states starts with the embeddings, attentions with the first layer.
        attention = vision.attentions[layer if layer < 0 else layer - 1]
        return features, attention[:, :, 0, 1:].mean(1), inner.multi_modal_projector(features)

    def visual(
        self,
        pixel_values: Array,
        text_embeds: Array,
        text_mask: Array,
        budget: int,
        config: Any,
        size: Size | None = None,
    ) -> ReferenceVisual:
        """Return the kept visual tokens for pixels as :meth:`encode` and text as the visual graph takes them."""
        features, saliency, tokens = self.encode(pixel_values, size)
        indices = select_tokens(features, saliency, tokens, text_embeds.astype(np.float32), text_mask, budget, config)
        return ReferenceVisual(np.take_along_axis(tokens, indices[:, :, None], axis=1), indices, tokens)

    def generate(self, inputs_embeds: Array, max_new_tokens: int, *, positions: Array | None = None) -> list[int]:
        """Return greedy token ids for one prompt ``[S, D]``, without the end-of-sequence token.

        ``positions [S]`` tells where its rows stand; without, they count up from 0.
        """
        positions = np.arange(len(inputs_embeds)) if positions is None else positions
        return self._greedy(
            max_new_tokens,
            inputs_embeds=torch.from_numpy(inputs_embeds)[None],
            position_ids=torch.from_numpy(positions)[None],
        )

    def generate_unpruned(
        self, token_ids: Array, pixel_values: Array, max_new_tokens: int, sizes: Sequence[Size] = ()
    ) -> list[int]:
        """Return greedy token ids of the unmodified model for one prompt with one placeholder per image.

        Args:
            token_ids: int64 ``[S]``, one placeholder id per image.
            pixel_values: float32 ``[pictures, 3, H, W]``.
            max_new_tokens: longest answer.
            sizes: of the images (width, height), for models that see them in tiles.
        """
        pixels = torch.from_numpy(pixel_values)
        images, lengths = self._images(pixels, sizes)
        repeats = np.ones(len(token_ids), np.int64)
        repeats[token_ids == self.model.config.image_token_index] = lengths
        expanded = torch.from_numpy(np.repeat(token_ids, repeats))[None]
        return self._greedy(max_new_tokens, input_ids=expanded, **images)

    def _images(self, pixels: torch.Tensor, sizes: Sequence[Size]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return what the model takes of images, and how many positions each has."""
        config = self.model.config.vision_config
        return {"pixel_values": pixels}, [(config.image_size // config.patch_size) ** 2] * len(pixels)

    def stream(self, inputs_embeds: Array, max_new_tokens: int) -> Iterator[int]:
        """Yield greedy token ids for one prompt ``[S, D]`` as each is known, past the end of the answer too."""
        given: dict[str, Any] = {"inputs_embeds": torch.from_numpy(inputs_embeds)[None]}
        for _ in range(max_new_tokens):
            with torch.no_grad():
                output = self.model(**given, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
            yield int(token)
            given = {"input_ids": token, "past_key_values": output.past_key_values}

    def _greedy(self, max_new_tokens: int, **inputs: torch.Tensor) -> list[int]:
        first = next(iter(inputs.values()))
        mask = torch.ones(first.shape[:2], dtype=torch.int64)
        with torch.no_grad():
            output = self.model.generate(**inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        ids: list[int] = output[0].tolist()
        if "input_ids" in inputs:
            ids = ids[first.shape[1] :]
        eos = self.model.generation_config.eos_token_id
        return ids[:-1] if ids and ids[-1] in ([eos] if isinstance(eos, int) else eos or []) else ids


class LlavaNextReference(LlavaReference):
    """A LLaVA-NeXT checkpoint, likewise: which patches stand where is transformers' word too."""

    model_class: ClassVar[Any] = LlavaNextForConditionalGeneration

    def encode(self, pixel_values: Array, size: Size | None = None) -> tuple[Array, Array, Array]:
        """Return the same of one image of ``size``, whose overview and tiles are ``pixel_values``."""
        assert size is not None
        with torch.no_grad():
            features, saliency, tokens = self._encode(torch.from_numpy(pixel_values))
            packed = [
                self._pack([part], [size])[0][0].numpy()[None] for part in (features, saliency[..., None], tokens)
            ]
        return packed[0], packed[1][..., 0], packed[2]

    def _images(self, pixels: torch.Tensor, sizes: Sequence[Size]) -> tuple[dict[str, torch.Tensor], list[int]]:
        heights = torch.tensor([(height, width) for width, height in sizes])
        with torch.no_grad():
            output = self.model.model.get_image_features(pixels, heights)
        found = output.pooler_output if hasattr(output, "pooler_output") else output
        return {"pixel_values": pixels, "image_sizes": heights}, [len(rows) for rows in found]

    def _pack(self, parts: list[torch.Tensor], sizes: Sequence[Size]) -> Any:
        """Return each image's ``[N, ...]``, without newlines."""
        heights = torch.tensor([(height, width) for width, height in sizes])
        return self.model.model.pack_image_features(parts, heights, "default", image_newline=None)


_REFERENCES = {"llava": LlavaReference, "llava_next": LlavaNextReference}


def make_reference(directory: Path, *, language_attention: str = "eager") -> LlavaReference:
    """Return the reference for the checkpoint's family; raise :class:`CheckpointError` if there is none."""
    family = read_config(directory)["model_type"]
    if family not in _REFERENCES:
        raise CheckpointError(
            "there is no PyTorch reference for this architecture", received=family, expected=", ".join(_REFERENCES)
        )
    return _REFERENCES[family](directory, language_attention=language_attention)
