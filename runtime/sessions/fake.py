"""A visual session in NumPy: made-up features, real selection. For testing pipelines without any engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.selection import FlashVLMConfig, select_tokens
from flashvlm_export.specs import Array, Feeds, GraphSpec


class FakeSession(VisualSession):
    """Takes the mean colour of each patch as its feature and a fixed random projection of it as its visual token.

    Deterministic; rows of a batch do not influence each other; the kept tokens follow ``config``.

    Args:
        spec: contract to imitate; the number of visual tokens has to be a square.
        config: settings of the selector.
    """

    name = "fake"

    def __init__(self, spec: GraphSpec, config: Any = None) -> None:
        super().__init__(spec)
        self.config = FlashVLMConfig() if config is None else config

    def _open(self) -> None:
        width = self._shape("text_embeds")[-1]
        self._projection = np.random.default_rng(0).standard_normal((3, int(width)))

    def _close(self) -> None:
        del self._projection

    def _run(self, feeds: Feeds) -> VisualOutputs:
        pixels: Array = feeds["pixel_values"].astype(np.float64)
        count = int(self._shape("scores")[-1])
        side, batch = round(count**0.5), len(pixels)
        patch = pixels.shape[-1] // side
        blocks = pixels[:, :, : side * patch, : side * patch].reshape(batch, 3, side, patch, side, patch)
        features = blocks.mean(axis=(3, 5)).reshape(batch, 3, count).transpose(0, 2, 1)
        saliency = np.abs(features).sum(-1)
        tokens = features @ self._projection
        indices = select_tokens(
            features,
            saliency,
            tokens,
            feeds["text_embeds"],
            feeds["text_mask"],
            int(feeds["budget"]),
            self.config,
        )
        kept = np.take_along_axis(tokens, indices[:, :, None], axis=1).astype(feeds["text_embeds"].dtype)
        return VisualOutputs(kept, indices, saliency.astype(np.float32))

    def _shape(self, name: str) -> tuple[int | str, ...]:
        return next(tensor.shape for tensor in (*self.spec.inputs, *self.spec.outputs) if tensor.name == name)
