"""The checkpoint in PyTorch, run by transformers: what every exported graph and engine is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.vision_utils import get_vision_window_index

from flashvlm_export.bundle import PREPROCESSOR, Bundle
from flashvlm_export.errors import CheckpointError
from flashvlm_export.export.checkpoint import read_config
from flashvlm_export.preprocessor import decode_preprocessor
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

    def scale_like(self, bundle: Bundle) -> None:
        """Scale images down as ``bundle`` does, where it goes further than its checkpoint."""

    def encode(self, pixel_values: Array, size: Size | None = None) -> tuple[Array, Array, Array]:
        """Return ``(patch_features [B,N,C], saliency [B,N], visual tokens before pruning [B,N,D])``, float32.

        ``size`` (width, height) is that of the image, for models that see one in tiles; the batch is then that image.
        """
        with torch.no_grad():
            parts = self._encode(torch.from_numpy(pixel_values))
        features, saliency, tokens = (part.numpy() for part in parts)
        return features, saliency, tokens

    def encode_image(self, image: Image.Image, pixel_values: Array) -> tuple[Array, Array, Array]:
        """Return the same of one image; ``pixel_values`` are what the visual graph takes of it."""
        return self.encode(pixel_values, image.size)

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

        ``positions [S]``, or ``[S, 3]``, tells where its rows stand; without, they count up from 0.
        """
        positions = np.arange(len(inputs_embeds)) if positions is None else positions
        ends, said = self._ends(), []
        for token in self.stream(inputs_embeds, positions, max_new_tokens):
            if token in ends:
                break
            said.append(token)
        return said

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

    def stream(self, inputs_embeds: Array, positions: Array, max_new_tokens: int) -> Iterator[int]:
        """Yield greedy token ids for one prompt ``[S, D]`` as each is known, past the end of the answer too.

        Args:
            inputs_embeds: float32 ``[S, D]``.
            positions: int64 ``[S]``, or ``[S, 3]``: where the rows stand; the answer goes on behind the largest.
            max_new_tokens: how many.
        """
        given: dict[str, Any] = {"inputs_embeds": torch.from_numpy(inputs_embeds)[None]}
        placed, total = torch.from_numpy(positions), 0
        for _ in range(max_new_tokens):
            total += len(placed)
            # The mask says that a gap is none: without, transformers takes it for the start of another sequence.
            mask = torch.ones(1, total, dtype=torch.int64)
            place = placed[None] if placed.ndim == 1 else placed.T[:, None]
            with torch.no_grad():
                output = self.model(**given, position_ids=place, attention_mask=mask, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
            yield int(token)
            given = {"input_ids": token, "past_key_values": output.past_key_values}
            placed = torch.full_like(placed[-1:], int(placed.max()) + 1)

    def _greedy(self, max_new_tokens: int, **inputs: torch.Tensor) -> list[int]:
        first = next(iter(inputs.values()))
        mask = torch.ones(first.shape[:2], dtype=torch.int64)
        with torch.no_grad():
            output = self.model.generate(**inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        ids: list[int] = output[0].tolist()
        if "input_ids" in inputs:
            ids = ids[first.shape[1] :]
        return ids[:-1] if ids and ids[-1] in self._ends() else ids

    def _ends(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return [eos] if isinstance(eos, int) else eos or []


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


class LlavaOnevisionReference(LlavaNextReference):
    """A LLaVA-OneVision checkpoint, likewise: transformers scales the tokens of tiles down too."""

    model_class: ClassVar[Any] = LlavaOnevisionForConditionalGeneration

    def scale_like(self, bundle: Bundle) -> None:
        """Scale the tokens of tiles down to those of as many."""
        self.model.config.vision_aspect_ratio = f"anyres_max_{bundle.manifest.dims.most_area}"

    def _encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inner = self.model.model
        layer = self.model.config.vision_feature_layer
        vision = inner.vision_tower(pixel_values, output_hidden_states=True, output_attentions=True)
        features = vision.hidden_states[layer]
        attention = vision.attentions[layer if layer < 0 else layer - 1]
        return features, attention.sum(2).mean(1), inner.multi_modal_projector(features)

    def _pack(self, parts: list[torch.Tensor], sizes: Sequence[Size]) -> Any:
        heights = torch.tensor([(height, width) for width, height in sizes])
        ratio = self.model.config.vision_aspect_ratio
        return self.model.model.pack_image_features(parts, heights, image_newline=None, vision_aspect_ratio=ratio)


class Qwen25VLReference(LlavaReference):
    """A Qwen2.5-VL checkpoint, likewise: its own image processor cuts the pictures up."""

    model_class: ClassVar[Any] = Qwen2_5_VLForConditionalGeneration

    def __init__(self, directory: Path, *, language_attention: str = "eager") -> None:
        super().__init__(directory, language_attention=language_attention)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(directory)

    def scale_like(self, bundle: Bundle) -> None:
        """Take as few pixels of an image."""
        settings = decode_preprocessor(bundle.file(PREPROCESSOR).read_bytes())
        assert settings.pixel_range is not None  # as in every bundle of this family
        self.processor.size = dict(zip(("shortest_edge", "longest_edge"), settings.pixel_range[1:], strict=True))

    def encode_image(self, image: Image.Image, pixel_values: Array) -> tuple[Array, Array, Array]:
        """Return ``(patch_features [1,N,D], saliency [1,N], visual tokens [1,N,D])``; the pixels are its own."""
        given = self.processor(image, return_tensors="pt")
        tower, seen = self.model.model.visual, []
        attend = modeling_qwen2_5_vl.eager_attention_forward

        def remember(module: Any, *args: Any, **kwargs: Any) -> Any:
            output, weights = attend(module, *args, **kwargs)
            if module is tower.blocks[-1].attn:
                seen.append(weights)
            return output, weights

        modeling_qwen2_5_vl.eager_attention_forward = remember
        try:
            with torch.no_grad():
                tokens = tower(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output
        finally:
            modeling_qwen2_5_vl.eager_attention_forward = attend
        (weights,) = seen
        received = weights.sum(2).mean(1)[0].reshape(-1, tower.spatial_merge_unit).mean(1)
        window_order, _ = get_vision_window_index(
            given["image_grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        rows = tokens.numpy()[None]
        return rows, received[torch.argsort(window_order)].numpy()[None], rows

    def generate_unpruned_images(
        self, token_ids: Array, images: Sequence[Image.Image], max_new_tokens: int
    ) -> list[int]:
        """Return greedy token ids of the unmodified model for a prompt with one placeholder per image."""
        given = self.processor(list(images), return_tensors="pt")
        repeats = np.ones(len(token_ids), np.int64)
        is_image = token_ids == self.model.config.image_token_id
        repeats[is_image] = given["image_grid_thw"].prod(-1).numpy() // self.model.model.visual.spatial_merge_unit
        expanded = torch.from_numpy(np.repeat(token_ids, repeats))[None]
        kinds = (expanded == self.model.config.image_token_id).int()
        return self._greedy(max_new_tokens, input_ids=expanded, mm_token_type_ids=kinds, **given)


_REFERENCES = {
    "llava": LlavaReference,
    "llava_next": LlavaNextReference,
    "llava_onevision": LlavaOnevisionReference,
    "qwen2_5_vl": Qwen25VLReference,
}


def make_reference(directory: Path, *, language_attention: str = "eager", like: Bundle | None = None) -> LlavaReference:
    """Return the reference for the checkpoint's family, which scales images down as the bundle ``like`` does.

    Raises:
        CheckpointError: if there is none.
    """
    family = read_config(directory)["model_type"]
    if family not in _REFERENCES:
        raise CheckpointError(
            "there is no PyTorch reference for this architecture", received=family, expected=", ".join(_REFERENCES)
        )
    reference = _REFERENCES[family](directory, language_attention=language_attention)
    if like is not None:
        reference.scale_like(like)
    return reference
