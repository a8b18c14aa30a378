"""The language model's input embeddings: looked up for text, joined with visual tokens.

The table is memory-mapped: a prompt reads its own few rows of what may be half a gigabyte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashvlm_export.errors import BundleError, PromptError

Rows = npt.NDArray[Any]


class TextEmbeddings:
    """The embedding table ``[vocab, D]`` of a bundle, float16 or float32.

    Args:
        path: ``text_embeddings.npy``.

    Raises:
        BundleError: if the file is missing, damaged, or no such table.
    """

    def __init__(self, path: str | Path) -> None:
        self._table = _open_table(Path(path))

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return self._table.shape[0]

    @property
    def width(self) -> int:
        """Channels of a row (``D``)."""
        return self._table.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the table on disk."""
        return self._table.dtype

    def lookup(self, ids: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> Rows:
        """Return the rows of ``ids``: ``[L, D]`` in ``dtype``, owned by the caller; ``L`` may be 0.

        Raises:
            PromptError: if ``ids`` are not whole numbers in one dimension, or one is outside of the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return np.empty((0, self.width), dtype)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise PromptError(
                "these are not token ids",
                received=f"{ids.dtype} {list(ids.shape)}",
                expected="whole numbers in one dimension",
            )
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise PromptError(
                "a token id is outside of the model's vocabulary",
                received=int(outside[0]),
                expected=f"0 to {self.vocab_size - 1}",
                hint="tokenise with the tokenizer of the same bundle",
            )
        return self._table[ids].astype(dtype, copy=False)


def pad_text(rows: Sequence[Rows]) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Return a batch of prompts as the visual graph takes it.

    Args:
        rows: per prompt ``[L_i, D]``, all of one dtype.

    Returns:
        ``text_embeds [B, L, D]``, zero behind each prompt's rows, and ``text_mask`` bool ``[B, L]``, true where there
        is one. ``L`` is the longest ``L_i`` but at least 1: graphs do not take empty inputs.

    Raises:
        PromptError: if there is no prompt.
    """
    if not rows:
        raise PromptError("there is no prompt", received="an empty batch", expected="at least one prompt")
    length = max(1, *(len(row) for row in rows))
    embeds = np.zeros((len(rows), length, rows[0].shape[1]), rows[0].dtype)
    mask = np.zeros((len(rows), length), np.bool_)
    for index, row in enumerate(rows):
        embeds[index, : len(row)] = row
        mask[index, : len(row)] = True
    return embeds, mask


def splice(text_rows: Rows, image_positions: Sequence[int], visual: Sequence[Rows]) -> Rows:
    """Return the prompt's embeddings with each placeholder replaced by that image's visual tokens.

    Args:
        text_rows: ``[S, D]``, a row for every token, placeholders included (their values are not used).
        image_positions: indices of the ``n`` placeholders, ascending.
        visual: per image ``[K_i, D]``, in the same order.

    Returns:
        ``[S - n + sum(K_i), D]`` in the dtype of ``text_rows``.

    Raises:
        PromptError: if placeholders and images do not match in number or place.
        BundleError: if visual tokens and embeddings differ in width.
    """
    positions = list(image_positions)
    if len(positions) != len(visual):
        raise PromptError(
            "the image placeholders do not match the images",
            received=f"{len(positions)} placeholder(s) for {len(visual)} image(s)",
            expected="one each",
        )
    if positions != sorted(set(positions)) or not all(0 <= position < len(text_rows) for position in positions):
        raise PromptError(
            "the image positions are not in the prompt",
            received=positions,
            expected=f"ascending, 0 to {len(text_rows) - 1}",
        )
    pieces = []
    start = 0
    for position, tokens in zip(positions, visual, strict=True):
        if tokens.ndim != 2 or tokens.shape[1] != text_rows.shape[1]:
            raise BundleError(
                "visual tokens and text embeddings differ in width",
                received=list(tokens.shape),
                expected=f"[K, {text_rows.shape[1]}]",
                hint="graph and embedding table come from different exports: export the bundle again",
            )
        pieces += [text_rows[start:position], tokens.astype(text_rows.dtype, copy=False)]
        start = position + 1
    return np.concatenate([*pieces, text_rows[start:]])


def splice_positions(
    length: int, image_positions: Sequence[int], places: Sequence[Rows], lengths: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return where each row of a spliced prompt would stand if nothing had been pruned.

    Args:
        length: tokens of the prompt, placeholders included.
        image_positions: indices of the placeholders, ascending.
        places: per image int64 ``[R_i]``, ascending: where its rows stand among those that it has without pruning.
        lengths: per image how many those are.

    Returns:
        int64 ``[length - n + sum(R_i)]``, ascending.
    """
    pieces = []
    start = behind = 0
    for position, rows, unpruned in zip(image_positions, places, lengths, strict=True):
        pieces += [np.arange(start, position) + behind, rows + position + behind]
        start = position + 1
        behind += unpruned - 1
    return np.concatenate([*pieces, np.arange(start, length) + behind]).astype(np.int64)


def splice_axes(
    length: int, image_positions: Sequence[int], kept: Sequence[Rows], axes: Sequence[Rows]
) -> npt.NDArray[np.int64]:
    """Return the same with three numbers for each row: time, row and column (M-RoPE, arXiv 2409.12191).

    Those of text are alike. Those of an image or a video count from where it stands; text goes on behind the largest of
    them all.

    Args:
        length: tokens of the prompt, placeholders included.
        image_positions: indices of the placeholders, ascending.
        kept: per image int64 ``[K_i]``, ascending: which of its visual tokens are kept.
        axes: per image int64 ``[N_i, 3]``: time, row and column of each visual token without pruning, from 0.

    Returns:
        int64 ``[length - n + sum(K_i), 3]``.
    """
    pieces = []
    start = behind = 0
    for position, indices, places in zip(image_positions, kept, axes, strict=True):
        pieces.append(np.repeat(np.arange(start, position)[:, None] + behind, 3, axis=1))
        pieces.append(position + behind + places[indices])
        start = position + 1
        behind += int(places.max())
    pieces.append(np.repeat(np.arange(start, length)[:, None] + behind, 3, axis=1))
    return np.concatenate(pieces).astype(np.int64)


def _open_table(path: Path) -> Rows:
    problem = None
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(table, np.ndarray):
            problem = "an archive of arrays"
        elif table.ndim != 2 or 0 in table.shape:
            problem = f"shape {list(table.shape)}"
        elif table.dtype not in (np.float16, np.float32):
            problem = f"dtype {table.dtype}"
    except (OSError, ValueError, EOFError) as error:
        problem = str(error)
    if problem:
        raise BundleError(
            "the embedding table cannot be read",
            received=f"{path}: {problem}",
            expected="a .npy file of float16 or float32 [vocab, D]",
            hint="copy it again from where it is whole, or export it again: "
            "flashvlm export MODEL --output BUNDLE --overwrite",
        )
    # A plain view: rows taken from a memmap would be of that class too.
    return table.view(np.ndarray)
