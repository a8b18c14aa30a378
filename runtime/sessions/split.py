"""The visual side in two halves: images are encoded once, and selected from for each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import ConfigError, SessionError
from flashvlm_export.runtime.graph_inputs import PreparedImage, encoder_feeds
from flashvlm_export.runtime.layout import ImageLayout
from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeGraph
from flashvlm_export.selection import SELECTORS
from flashvlm_export.specs import ENCODER_OUTPUTS, QUESTION_INPUTS, Array, Feeds, GraphSpec, Precision


@dataclass(frozen=True)
class EncodedImage:
    """What selectors need of one image, whatever is asked about it.

    Attributes:
        patch_features: ``[N, C]`` in the graph's floating-point dtype.
        saliency: float32 ``[N]``.
        projected_tokens: ``[N, D]`` in the graph's floating-point dtype.
        layout: of its visual tokens.
    """

    patch_features: Array
    saliency: Array
    projected_tokens: Array
    layout: ImageLayout

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

    def encode(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Return each image encoded; they own their memory.

        Args:
            images: as many visual tokens each.

        Raises:
            SessionError: if the session is closed or an array does not fit.
        """
        rows = zip(*self._encode(encoder_feeds(images)), strict=True)
        return [
            EncodedImage(features.copy(), saliency.copy(), tokens.copy(), image.layout)
            for image, (features, saliency, tokens) in zip(images, rows, strict=True)
        ]

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
        feeds = {name: np.stack([getattr(image, name) for image in images]) for name in ENCODER_OUTPUTS} | {
            "text_embeds": text_embeds,
            "text_mask": text_mask,
            "budget": np.array(budget, np.int64),
        }
        return self._select(feeds, self.loaded(selector))

    def loaded(self, selector: str | None) -> str:
        """Return the name of a loaded selector, the first for ``None``; raise :class:`ConfigError` if it is not."""
        if selector is not None and selector not in self.selectors:
            raise ConfigError(
                "this selector is not loaded", received=repr(selector), expected=f"one of {', '.join(self.selectors)}"
            )
        return selector or self.selectors[0]

    def _encode(self, feeds: Feeds) -> list[Array]:
        encoder = self._require_open()
        self.halves.encoder.spec.check_feeds(feeds)
        return encoder.run(feeds)

    def _select(self, feeds: Feeds, selector: str) -> VisualOutputs:
        self._require_open()
        self.halves.selectors[selector].spec.check_feeds(feeds)
        return VisualOutputs(*self._selectors[selector].run(feeds))

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
        vision = {name: feeds[name] for name in self.spec.vision_inputs}
        encoded = dict(zip(ENCODER_OUTPUTS, self._encode(vision), strict=True))
        question = {name: feeds[name] for name in QUESTION_INPUTS}
        return self._select({**encoded, **question}, self.selectors[0])
