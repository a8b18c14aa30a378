"""The checkpoint in PyTorch, run by transformers: what every exported graph and engine is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from flashvlm_export.selection import select_tokens
from flashvlm_export.specs import Array


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

    def __init__(self, directory: Path, *, language_attention: str = "eager") -> None:
        attention = {"": "eager", "vision_config": "eager", "text_config": language_attention}
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        ).eval()

    def encode(self, pixel_values: Array) -> tuple[Array, Array, Array]:
        """Return ``(patch_features [B,N,C], saliency [B,N], visual tokens before pruning [B,N,D])``, float32."""
        inner = self.model.model
        layer = self.model.config.vision_feature_layer
        with torch.no_grad():
            vision = inner.vision_tower(
                torch.from_numpy(pixel_values), output_hidden_states=True, output_attentions=True
            )
            features = vision.hidden_states[layer][:, 1:]
            # hidden_states starts with the embeddings, attentions with the first layer.
            attention = vision.attentions[layer if layer < 0 else layer - 1]
            tokens = inner.multi_modal_projector(features)
        return features.numpy(), attention[:, :, 0, 1:].mean(1).numpy(), tokens.numpy()

    def visual(
        self, pixel_values: Array, text_embeds: Array, text_mask: Array, budget: int, config: Any
    ) -> ReferenceVisual:
        """Return the kept visual tokens for inputs as the visual graph takes them."""
        features, saliency, tokens = self.encode(pixel_values)
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

    def generate_unpruned(self, token_ids: Array, pixel_values: Array, max_new_tokens: int) -> list[int]:
        """Return greedy token ids of the unmodified model for one prompt with one placeholder per image.

        Args:
            token_ids: int64 ``[S]``, one placeholder id per image.
            pixel_values: float32 ``[images, 3, H, W]``.
            max_new_tokens: longest answer.
        """
        config = self.model.config
        per_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        expanded = np.repeat(token_ids, np.where(token_ids == config.image_token_index, per_image, 1))
        return self._greedy(
            max_new_tokens,
            input_ids=torch.from_numpy(expanded)[None],
            pixel_values=torch.from_numpy(pixel_values),
        )

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
