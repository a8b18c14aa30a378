"""What an architecture has to declare so that everything else can stay generic."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashvlm_export.manifest import VideoSettings
from flashvlm_export.preprocessor import PreprocessorSettings
from flashvlm_export.specs import GraphSpec, Precision, VisualDims, visual_graph_spec

#: Visual tokens of one image that TensorRT can sort; where a model makes more of one, it is scaled down to these.
MOST_TOKENS = 3840


@dataclass(frozen=True)
class GraphInputs:
    """Sample inputs of a graph together with its contract, dynamic dimensions included."""

    tensors: tuple[Tensor, ...]
    spec: GraphSpec


class Adapter(ABC):
    """One architecture, read from a checkpoint's ``config.json``.

    Attributes:
        family: key of the registry.
        config: transformers' config object (hub configs leave defaults out; the class fills them in).
        dims: sizes of the visual side.
        image_token_id: id of the image placeholder.
        renames: regular expressions and what takes their place, in this order, in names that checkpoints have had.
        newline_key: canonical name of the embedding ``[D]`` that ends each line of tiles, if there is one.
        selection_defaults: settings that selectors which have them take for this family, if nothing else is said.
        notes: what a user has to know of how this checkpoint is exported, in sentences.
        text_config: of the language model, as its causal LM's class takes it.
        video: how it sees videos; ``None`` where it takes none.
        video_token_id: id of a video's placeholder, if it takes some.
        position_sections: rotary frequencies that turn by time, row and column, where positions have three axes.
    """

    family: ClassVar[str]
    config: Any
    dims: VisualDims
    image_token_id: int
    renames: ClassVar[Sequence[tuple[str, str]]] = ()
    newline_key: ClassVar[str | None] = None
    selection_defaults: ClassVar[Mapping[str, Any]] = {}
    notes: tuple[str, ...] = ()
    text_config: Any
    video: VideoSettings | None = None
    video_token_id: int | None = None
    position_sections: tuple[int, ...] = ()

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read ``config.json``; raise :class:`CheckpointError` where it asks for what this adapter does not do."""

    @abstractmethod
    def encoder(self, *, needs_saliency: bool) -> nn.Module:
        """Return the vision encoder with projector, on the meta device, its parameters named as in :meth:`canonical`.

        ``forward`` takes what the graph takes but the question, see :func:`visual_graph_spec`, and returns
        ``(patch_features [B,N,C], saliency float32 [B,N] or None, visual_tokens [B,N,D])``.
        """

    @classmethod
    def canonical(cls, key: str) -> str:
        """Return the one name this package uses for a tensor that checkpoints of different ages name differently."""
        for pattern, replacement in cls.renames:
            key = re.sub(pattern, replacement, key)
        return key

    @property
    @abstractmethod
    def embedding_key(self) -> str:
        """Canonical name of the LLM's input embedding table ``[vocab, D]``."""

    @staticmethod
    def text_key(name: str) -> str:
        """Return the canonical name of a tensor that the causal LM's own state dict calls ``name``."""
        return re.sub(r"^model\.", "language_model.", name)

    @property
    @abstractmethod
    def default_chat_template(self) -> str:
        """Jinja template in Hugging Face's message format, for checkpoints that come without one."""

    @property
    @abstractmethod
    def default_processor(self) -> dict[str, Any]:
        """What ``preprocessor_config.json`` of such a checkpoint says, for random weights."""

    @property
    def default_video_processor(self) -> dict[str, Any]:
        """What ``video_preprocessor_config.json`` of such a checkpoint says, where it takes videos."""
        return self.default_processor

    def take_processor(self, settings: PreprocessorSettings) -> None:
        """Take from how the checkpoint prepares images what its configuration does not say, before sizes are asked for.

        Of images that keep their own resolution, the most visual tokens that one can have.
        """
        if settings.pixel_range is not None:
            self.dims = replace(self.dims, num_patches=max(settings.most_units, self.sample_patches))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        size: int = self.text_config.vocab_size
        return size

    def inputs(self, precision: Precision, *, batch: int, text: int, budget: int, seed: int = 0) -> GraphInputs:
        """Return seeded random inputs of the given sizes, and the contract they follow.

        Each image has :attr:`sample_patches` visual tokens. With more than one row, the last one has less text than
        ``text``, so that padding is exercised.
        """
        dims = self.dims
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vision = self.vision_inputs(batch)
            text_embeds = torch.randn(batch, text, dims.llm_width)
        text_mask = torch.ones(batch, text, dtype=torch.bool)
        if batch > 1:
            text_mask[-1, (text + 1) // 2 :] = False
        text_embeds = text_embeds * text_mask[:, :, None]
        dtype = getattr(torch, precision.float_dtype)
        tensors = (*vision, text_embeds.to(dtype), text_mask, torch.tensor(budget))
        return GraphInputs(tensors, visual_graph_spec(dims, precision))

    @property
    def sample_patches(self) -> int:
        """Visual tokens of an image of :meth:`inputs`."""
        return self.dims.num_patches

    @abstractmethod
    def vision_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return what the graph takes of ``batch`` random images, from torch's global generator."""


def structured(noise: Tensor) -> Tensor:
    """Return images with structure at several scales, as normalised photographs have, made of uniform ``noise``."""
    image = 2 * noise - 1
    for cells in (2, 7, 23):
        coarse = 2 * noise[:, :, :cells, :cells] - 1
        image = image + nn.functional.interpolate(coarse, size=noise.shape[2:], mode="bilinear", align_corners=False)
    return image
