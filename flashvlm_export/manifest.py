"""``manifest.json``: what a bundle holds and how its parts fit together (schema version 1).

Decoded strictly: a missing field or a wrong type names its place in the file (see ``records.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flashvlm_export.records import decode_record
from flashvlm_export.specs import GraphSpec, VisualDims

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

#: Text that guides selection: all of the prompt, or the question alone.
TextSpan = Literal["prompt", "question"]
#: Where kept visual tokens stand in the language model: without gaps, or where they stood.
Positions = Literal["contiguous", "original"]


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
        model: registry name, hub id or directory name that was exported.
        family: adapter, such as ``llava``.
        weights: ``checkpoint`` or ``random:SEED``.
        config_sha256: hash of the checkpoint's ``config.json``, its keys sorted.
        weights_sha256: hash over name, dtype, shape and bytes of every tensor that went into the visual graph and
            the embedding table.
    """

    model: str
    family: str
    weights: str
    config_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of one file of the bundle."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """One visual graph: its ONNX file (external data, if any, beside it) and its contract."""

    file: str
    spec: GraphSpec


@dataclass(frozen=True)
class Selection:
    """The selector inside the graph and its settings."""

    selector: str
    config: dict[str, Any]


@dataclass(frozen=True)
class SelectorEntry:
    """One selector as a graph of its own, and its settings."""

    file: str
    spec: GraphSpec
    config: dict[str, Any]


@dataclass(frozen=True)
class SplitGraphs:
    """The fused graph in two halves, for images about which more than one question is asked.

    Attributes:
        encoder: pixels to patch features, saliency and projected tokens; its weights are the fused graph's file.
        selectors: those, text and budget to the kept tokens; by name, the fused graph's own first.
    """

    encoder: GraphEntry
    selectors: dict[str, SelectorEntry]


@dataclass(frozen=True)
class PromptSettings:
    """How a question becomes token ids.

    Attributes:
        image_token: placeholder text; each stands for one image.
        image_token_id: its id.
        bos_token: start-of-sequence text that the tokenizer adds or the template writes; empty for none.
        eos_token: end-of-sequence text for the template; empty for none.
        eos_token_ids: ids that end an answer.
        pad_token_id: id for padding, if the tokenizer has one.
        video_token: placeholder text of a video; empty where the model takes none.
        video_token_id: its id.
    """

    image_token: str
    image_token_id: int
    bos_token: str
    eos_token: str
    eos_token_ids: list[int]
    pad_token_id: int | None
    video_token: str = ""
    video_token_id: int | None = None


@dataclass(frozen=True)
class VideoSettings:
    """How the frames of a video become visual tokens.

    Attributes:
        frames_per_moment: frames that the encoder sees as one picture, after the other moments and before the next.
        shrinks: how many times shorter the sides of a frame's grid of visual tokens are, rounded up, than those of a
            picture's.
        steps_per_second: steps of the time axis, where positions have one; 0 where they have none.
    """

    frames_per_moment: int = 1
    shrinks: int = 1
    steps_per_second: float = 0.0


@dataclass(frozen=True)
class DecoderEntry:
    """The LLM decoder that takes ``inputs_embeds`` (written by onnxruntime-genai's model builder).

    Attributes:
        file: ONNX file below the bundle.
        precision: ``fp32``, ``fp16``, ``int8`` or ``int4``.
        num_layers: layers of the KV cache.
        num_kv_heads: key/value heads per layer.
        head_size: channels per head.
        max_positions: longest sequence, prompt and answer together.
    """

    file: str
    precision: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    max_positions: int


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime has to know about a bundle.

    Attributes:
        schema_version: of this file; readers refuse a newer one.
        dims: sizes of the visual side.
        graphs: visual graphs by precision (``fp32``, ``fp16``, ``int8``).
        vocab_size: rows of the embedding table.
        prompt: tokeniser settings; ``None`` in a bundle made for sizing, without a tokenizer.
        decoder: the LLM, where the bundle carries one.
        files: every file but the manifest, by path relative to the bundle.
        tools: versions of the packages that wrote the bundle.
        checks: what was measured before the bundle was called good: precision → check → figure.
        split: encoder and selectors apart, by precision, where the bundle has them.
        position_axes: numbers of a position in the language model: 1, or 3 for time, row and column (M-RoPE).
        video: of a model that takes videos.
    """

    schema_version: int
    source: Source
    dims: VisualDims
    selection: Selection
    graphs: dict[str, GraphEntry]
    vocab_size: int
    prompt: PromptSettings | None
    decoder: DecoderEntry | None
    files: dict[str, FileEntry]
    tools: dict[str, str]
    checks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    split: dict[str, SplitGraphs] = field(default_factory=dict)
    position_axes: int = 1
    video: VideoSettings | None = None

    @property
    def default_positions(self) -> Positions:
        """Where kept tokens stand if nothing is said: as the authors of FlashVLM have it for either kind of model."""
        return "contiguous" if self.position_axes == 1 else "original"

    def __post_init__(self) -> None:
        if not self.graphs:
            raise ValueError("a bundle has at least one graph")


def decode_manifest(content: bytes) -> Manifest:
    """Return the manifest in ``content``; raise :class:`BundleError` if it is no manifest, or a newer one."""
    return decode_record(
        content,
        Manifest,
        newest=SCHEMA_VERSION,
        what=MANIFEST,
        mend="copy it again from where it is whole, or export it again: "
        "flashvlm export MODEL --output BUNDLE --overwrite",
    )
