"""A pruned prompt as a file that any LLM engine can take: ``.safetensors``, version 1.

Tensors, all of one prompt of ``S`` positions:

=================  ==============  ==========================================================================
``inputs_embeds``  float32 [S, D]  rows for prefill: text, and the kept visual tokens in place of each image
``token_ids``      int64 [S]       ids of the text; the image placeholder's id where a visual token stands
``positions``      int64 [S]       where each row stands, ascending; without gaps, or with those of pruned tokens; or
                   int64 [S, 3]    time, row and column of each row, for models whose positions have three axes
``kept_N``         int64 [K]       of image N from 0: which visual tokens were kept, ascending
``scores_N``       float32 [n]     of image N: score of every visual token
=================  ==============  ==========================================================================

The file's metadata has one entry, ``flashvlm_prompt``: :class:`PromptRecord` as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flashvlm_export import __version__
from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import BundleError, PromptError
from flashvlm_export.files import atomic_write
from flashvlm_export.manifest import Selection, Source
from flashvlm_export.records import decode_record, encode_record
from flashvlm_export.runtime.llm.base import counted_positions
from flashvlm_export.runtime.request import PrunedPrompt
from flashvlm_export.specs import Array

SCHEMA_VERSION = 1
ENTRY = "flashvlm_prompt"
_MEND = "write it again: flashvlm prompt BUNDLE --image … --prompt … --output FILE"


@dataclass(frozen=True)
class PromptRecord:
    """What the tensors do not say.

    Attributes:
        schema_version: of this record.
        text: the prompt before splicing, placeholders included.
        image_spans: per image the rows ``[first, behind the last]`` that its visual tokens take, and the newlines of an
            image in tiles.
        budget: visual tokens kept per image, at most.
        visual_tokens: of one image without pruning, at most.
        text_span: text that guided the selection.
        selection: selector and settings.
        vocab_size: rows of the embedding table.
        stop_token_ids: ids that end the answer.
        source: checkpoint and hashes of the bundle that wrote it; an engine has to hold the same language model.
        tool: name and version of what wrote it.
    """

    schema_version: int
    text: str
    image_spans: list[tuple[int, int]]
    budget: int
    visual_tokens: int
    text_span: str
    selection: Selection
    vocab_size: int
    stop_token_ids: list[int]
    source: Source
    tool: str


@dataclass(frozen=True)
class PromptFile:
    """A file that was read: its record, and its tensors as in the table above."""

    record: PromptRecord
    inputs_embeds: Array
    token_ids: Array
    positions: Array
    kept: list[Array]
    scores: list[Array]

    @property
    def has_gaps(self) -> bool:
        """Whether visual tokens stand where they stood before others were pruned."""
        counted = counted_positions(len(self.positions), self.positions.shape[-1] if self.positions.ndim > 1 else 1)
        return not np.array_equal(self.positions, counted)


def write_prompt(
    path: Path, prompt: PrunedPrompt, bundle: Bundle, *, text_span: str, selector: str | None = None
) -> PromptRecord:
    """Write ``prompt`` atomically and return its record.

    Args:
        path: file to write or replace.
        prompt: from :meth:`Pipeline.encode`.
        bundle: that it was encoded with.
        text_span: as given there.
        selector: as given there; ``None`` for the fused graph's own.

    Raises:
        StorageError: if the file cannot be written.
    """
    manifest = bundle.manifest
    selection = manifest.selection
    if selector is not None and selector != selection.selector:
        halves = next(iter(manifest.split.values()))
        selection = Selection(selector, halves.selectors[selector].config)
    assert manifest.prompt is not None  # a pipeline refuses such bundles
    token_ids, spans = _expand(prompt)
    tensors: dict[str, Any] = {
        "inputs_embeds": np.ascontiguousarray(prompt.inputs_embeds, np.float32),
        "token_ids": token_ids,
        "positions": prompt.positions,
    }
    for number, (indices, scores) in enumerate(zip(prompt.indices, prompt.scores, strict=True)):
        tensors[f"kept_{number}"] = np.ascontiguousarray(indices, np.int64)
        tensors[f"scores_{number}"] = np.ascontiguousarray(scores, np.float32)
    record = PromptRecord(
        schema_version=SCHEMA_VERSION,
        text=prompt.prompt.text,
        image_spans=spans,
        budget=max(len(indices) for indices in prompt.indices),
        visual_tokens=manifest.dims.num_patches,
        text_span=text_span,
        selection=selection,
        vocab_size=manifest.vocab_size,
        stop_token_ids=manifest.prompt.eos_token_ids,
        source=manifest.source,
        tool=f"flashvlm-export {__version__}",
    )
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={ENTRY: encode_record(record).decode()}))
    return record


def read_prompt(path: Path) -> PromptFile:
    """Return what :func:`write_prompt` wrote, checked.

    Raises:
        PromptError: if the file cannot be read or is no such file, its record is damaged or of a newer version, or
            tensors and record do not fit together.
    """
    try:
        with safe_open(path, "numpy") as opened:
            record = _read_record(path, opened.metadata() or {})
            images = range(len(record.image_spans))
            wanted = {"inputs_embeds": ("F32", 2), "token_ids": ("I64", 1), "positions": ("I64", 1)}
            wanted |= {f"kept_{number}": ("I64", 1) for number in images}
            wanted |= {f"scores_{number}": ("F32", 1) for number in images}
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            have = {name: (part.get_dtype(), len(part.get_shape())) for name, part in slices.items()}
            if have.get("positions") == ("I64", 2):  # of three axes
                wanted["positions"] = ("I64", 2)
            if have != wanted:
                raise PromptError(
                    "the prompt file has other tensors than its record says",
                    received=f"{path}: {have}",
                    expected=f"dtypes and dimensions {wanted}",
                    hint=_MEND,
                )
            tensors = {name: opened.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise PromptError("the prompt file cannot be read", received=f"{path}: {error}", hint=_MEND) from error
    file = PromptFile(
        record,
        tensors["inputs_embeds"],
        tensors["token_ids"],
        tensors["positions"],
        [tensors[f"kept_{number}"] for number in images],
        [tensors[f"scores_{number}"] for number in images],
    )
    length = len(file.token_ids)
    fits = len(file.inputs_embeds) == length == len(file.positions)
    fits = fits and all(
        start >= 0 and start + len(kept) <= end <= length
        for (start, end), kept in zip(record.image_spans, file.kept, strict=True)
    )
    if not fits:
        raise PromptError(
            "tensors and record of the prompt file do not fit together",
            received=f"{path}: { ({name: list(array.shape) for name, array in tensors.items()}) }",
            expected=f"rows for {length} positions and the images at {record.image_spans}",
            hint=_MEND,
        )
    return file


def _read_record(path: Path, metadata: Mapping[str, str]) -> PromptRecord:
    if ENTRY not in metadata:
        raise PromptError(
            "this file holds no pruned prompt",
            received=path,
            expected=f"a safetensors file with the entry {ENTRY}",
            hint=_MEND,
        )
    content = metadata[ENTRY].encode()
    try:
        return decode_record(content, PromptRecord, newest=SCHEMA_VERSION, what=f"the record of {path}", mend=_MEND)
    except BundleError as error:
        raise PromptError(error.what, received=error.received, expected=error.expected, hint=error.hint) from error


def require_same_weights(record: PromptRecord, bundle: Bundle) -> None:
    """Raise :class:`PromptError` unless ``bundle`` was exported from the weights that the prompt was made with."""
    have, want = record.source.weights_sha256, bundle.manifest.source.weights_sha256
    if have != want:
        raise PromptError(
            "the prompt was made with another model",
            received=f"{record.source.model}, weights {have[:12]}",
            expected=f"{bundle.manifest.source.model}, weights {want[:12]}",
            hint="give the bundle that wrote it, or write the prompt again with this one",
        )


def _expand(prompt: PrunedPrompt) -> tuple[Array, list[tuple[int, int]]]:
    """Return the ids with a placeholder for each visual token, and the rows of each image."""
    repeats = np.ones(len(prompt.prompt.token_ids), np.int64)
    for place, image in zip(prompt.prompt.image_positions, prompt.images, strict=True):
        repeats[place] = len(image.rows)
    ends = np.cumsum(repeats)
    spans = [(int(ends[place] - repeats[place]), int(ends[place])) for place in prompt.prompt.image_positions]
    return np.repeat(prompt.prompt.token_ids, repeats), spans
