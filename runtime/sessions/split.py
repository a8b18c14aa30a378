"""The visual side in two halves: images are encoded once, and selected from for each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import ConfigError, SessionError
from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeGraph
from flashvlm_export.selection import SELECTORS
from flashvlm_export.specs import Array, Feeds, GraphSpec, Precision


@dataclass(frozen=True)
class EncodedImage:
    """What selectors need of one image, whatever is asked about it.

    Attributes:
        patch_features: ``[N, C]`` in the graph's floating-point dtype.
        saliency: float32 ``[N]``.
        projected_tokens: ``[N, D]`` in the graph's floating-point dtype.
    """

    patch_features: Array
    saliency: Array
    projected_tokens: Array

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""
        return self.patch_features.nbytes + self.saliency.nbytes + self.projected_tokens.nbytes


class SplitSession(VisualSession):
    """Runs encoder and selectors of a bundle in ONNX Runtime; :meth:`run` does both, as the fused graph does.

    Args:
        bundle: exported with ``--split``.
        precision: of the graphs.
        selectors: names of those to load, the first of which :meth:`select` takes by default; empty for the fused
            graph's own.
        providers: execution providers in order of preference; the first one has to be available.
        threads: threads of one operator; ``None`` leaves it to ONNX Runtime.

    Raises:
        ConfigError: if the bundle has no such graphs.
    """

    name = "onnxruntime split"

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision,
        selectors: Sequence[str] = (),
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        halves = bundle.split_graphs(precision)
        super().__init__(bundle.manifest.graphs[precision.value].spec)
        own = next(iter(halves.selectors))
        self.selectors = tuple(selectors) or (own,)
        for name in self.selectors:
            if name not in halves.selectors:
                raise ConfigError(
                    "the bundle has no such selector",
                    received=repr(name),
                    expected=f"one of {', '.join(halves.selectors)}",
                    hint=f"export it too: {bundle.export_command(split=[*halves.selectors, name])}"
                    if name in SELECTORS
                    else None,
                )
        self.bundle = bundle
        self.halves = halves
        self.providers = tuple(providers)
        self.threads = threads
        self._encoder: OnnxRuntimeGraph | None = None
        self._selectors: dict[str, OnnxRuntimeGraph] = {}

    def encode(self, pixel_values: Array) -> list[EncodedImage]:
        """Return each image of ``pixel_values`` ``[B, 3, H, W]`` encoded; they own their memory.

        Raises:
            SessionError: if the session is closed or the array does not fit.
        """
        encoder = self._require_open()
        feeds = {"pixel_values": pixel_values}
        self.halves.encoder.spec.check_feeds(feeds)
        return [EncodedImage(*(array.copy() for array in rows)) for rows in zip(*encoder.run(feeds), strict=True)]

    def select(
        self,
        images: Sequence[EncodedImage],
        text_embeds: Array,
        text_mask: Array,
        budget: int,
        selector: str | None = None,
    ) -> VisualOutputs:
        """Return what is kept of each image.

        Args:
            images: from :meth:`encode`.
            text_embeds: ``[B, L, D]``, a row for each image, in the graph's floating-point dtype.
            text_mask: bool ``[B, L]``.
            budget: visual tokens to keep per image, ``1..N``.
            selector: one of :attr:`selectors`; ``None`` takes the first.

        Raises:
            ConfigError: if the selector was not loaded.
            SessionError: if the session is closed or an array does not fit.
            BudgetError: if the budget is outside of ``1..N``.
        """
        self._require_open()
        name = self.loaded(selector)
        feeds = {
            "patch_features": np.stack([image.patch_features for image in images]),
            "saliency": np.stack([image.saliency for image in images]),
            "projected_tokens": np.stack([image.projected_tokens for image in images]),
            "text_embeds": text_embeds,
            "text_mask": text_mask,
            "budget": np.array(budget, np.int64),
        }
        self.halves.selectors[name].spec.check_feeds(feeds)
        return VisualOutputs(*self._selectors[name].run(feeds))

    def loaded(self, selector: str | None) -> str:
        """Return the name of a loaded selector, the first for ``None``; raise :class:`ConfigError` if it is not."""
        if selector is not None and selector not in self.selectors:
            raise ConfigError(
                "this selector is not loaded", received=repr(selector), expected=f"one of {', '.join(self.selectors)}"
            )
        return selector or self.selectors[0]

    def _require_open(self) -> OnnxRuntimeGraph:
        if self._encoder is None:
            raise SessionError("the session is not open", hint="call open(), or use it in a with statement")
        return self._encoder

    def _open(self) -> None:
        def load(file: str, spec: GraphSpec) -> OnnxRuntimeGraph:
            return OnnxRuntimeGraph(self.bundle.file(file), spec, self.providers, self.threads)

        self._selectors = {
            name: load(self.halves.selectors[name].file, self.halves.selectors[name].spec) for name in self.selectors
        }
        self._encoder = load(self.halves.encoder.file, self.halves.encoder.spec)

    def _close(self) -> None:
        self._encoder, self._selectors = None, {}

    def _run(self, feeds: Feeds) -> VisualOutputs:
        images = self.encode(feeds["pixel_values"])
        return self.select(images, feeds["text_embeds"], feeds["text_mask"], int(feeds["budget"]))
