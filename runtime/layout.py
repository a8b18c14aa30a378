"""Where an image's visual tokens come from in the encoder's output, and how they stand in a prompt.

An image is seen as one picture, or, at high resolution, as an overview and tiles (arXiv 2310.03744, LLaVA-NeXT). The
tiles' patches then stand in the prompt line by line across all tiles, without the borders that only fill tiles up, and
each line ends with the model's newline embedding. LLaVA-OneVision (arXiv 2408.03326) also scales grids down behind the
encoder, those of many tiles and those of a video's frames; a video is a clip of pictures, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flashvlm_export.specs import SHORTENED, Array

Size = tuple[int, int]


def _no_lines() -> Array:
    return np.empty((0, 2), np.int64)


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """The visual tokens of one image, or of a clip, before pruning.

    Attributes:
        grids: rows and columns of the grids that the tokens form one after the other: that of the overview and that of
            the tiles, if any, both of the whole picture; or those of a clip's frames.
        lines: int64 ``[L, 2]``, ascending: first token of each line that ends with a newline, and the one behind its
            last.
        times: of each grid of a clip, in steps of the time axis; empty where all are of one moment.
    """

    grids: tuple[Size, ...]
    lines: Array = field(default_factory=_no_lines)
    times: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the image (``N``), newlines not counted."""
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def length(self) -> int:
        """Rows that the image takes in a prompt without pruning: its visual tokens, and newlines."""
        return self.num_tokens + len(self.lines)

    def spread(self, indices: Array, tokens: Array, newline: Array | None) -> tuple[Array, Array]:
        """Return what stands in the prompt for an image of which some visual tokens are kept.

        Args:
            indices: int64 ``[K]``, ascending: the kept ones.
            tokens: ``[K, D]``.
            newline: ``[D]``, put behind the last kept token of each line; with everything kept also on lines that have
                no token, as those of an image thinner than one, so that the prompt is the model's own. ``None`` where
                there are no lines.

        Returns:
            ``[R, D]``, and int64 ``[R]``: where each row stands among the :attr:`length` of the unpruned image.
        """
        if newline is None or not len(self.lines):
            return tokens, indices
        first, end = np.searchsorted(indices, self.lines.T)
        shown = (first < end) | (len(indices) == self.num_tokens)
        newlines = self.lines[shown, 1] + np.flatnonzero(shown)
        places = np.concatenate([self.places_of(indices), newlines])
        order = np.argsort(places)
        return np.concatenate([tokens, np.broadcast_to(newline, (len(newlines), len(newline)))])[order], places[order]

    def places_of(self, indices: Array) -> Array:
        """Return int64 ``[K]``: where the visual tokens of ``indices [K]`` stand among all rows of the image."""
        return indices + np.searchsorted(self.lines[:, 1], indices, side="right")

    def axes(self) -> Array:
        """Return int64 ``[N, 3]``: time, row and column of each visual token, from 0 (M-RoPE, arXiv 2409.12191)."""
        times = self.times or (0,) * len(self.grids)
        each = [
            np.stack(np.meshgrid([time], np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 3)
            for time, (rows, columns) in zip(times, self.grids, strict=True)
        ]
        return np.concatenate(each).astype(np.int64)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Of which of the encoder's rows, over all tiles or windows of an image, each visual token is made.

    Attributes:
        order: int64 ``[N]``; or ``[N, 4]`` where tokens are interpolated.
        weights: float32 ``[N, 4]``, how much each counts; ``None`` where a token is one row.
    """

    order: Array
    weights: Array | None = None


def one_picture(grid: Size) -> ImageLayout:
    """Return the layout of an image that is one picture of ``grid`` patch rows and columns."""
    return ImageLayout((grid,))


def with_newline_at_end(layout: ImageLayout) -> ImageLayout:
    """Return a layout without lines as one line, which ends with a newline."""
    return ImageLayout(layout.grids, np.array([[0, layout.num_tokens]]), layout.times)


def clip(frames: Sequence[ImageLayout], times: Sequence[int] = ()) -> ImageLayout:
    """Return the layout of ``frames``, each of one grid, one after the other."""
    return ImageLayout(tuple(grid for frame in frames for grid in frame.grids), times=tuple(times))


def overview_and_tiles(size: Size, tiles: Size, grid: Size, most_area: int = 0) -> tuple[TokenRows, ImageLayout]:
    """Return rows and layout of an image of ``size`` (width, height) seen in ``tiles`` (rows, columns) and an overview.

    Args:
        size: of the image, in pixels.
        tiles: rows and columns of tiles.
        grid: patch rows and columns of a tile.
        most_area: tokens of how many tiles those of all tiles are scaled down to, where they are clearly more
            (``anyres_max`` of LLaVA-OneVision); 0 for never. All tokens are then interpolated, most from one row.
    """
    per_tile = math.prod(grid)
    # Of [tile rows, tile columns, rows, columns] into lines across all tiles; the overview is the first tile.
    numbers = per_tile + np.arange(math.prod(tiles) * per_tile, dtype=np.int64).reshape(*tiles, *grid)
    lines = numbers.transpose(0, 2, 1, 3).reshape(tiles[0] * grid[0], tiles[1] * grid[1])
    lines = lines[_without_borders(size, lines.shape)]
    overview = np.arange(per_tile).reshape(grid)
    if not most_area:
        shape, rows = lines.shape, TokenRows(np.concatenate([overview.ravel(), lines.ravel()]))
    else:
        shorter = math.sqrt(lines.size / (most_area * per_tile))
        small = shorter > SHORTENED
        shape = (int(lines.shape[0] // shorter), int(lines.shape[1] // shorter)) if small else lines.shape
        parts = [interpolated(overview, grid), interpolated(lines, shape)]
        rows = TokenRows(
            np.concatenate([part.order for part in parts]), np.concatenate([part.weights for part in parts])
        )
    ends = per_tile + shape[1] * np.arange(1, shape[0] + 1)
    return rows, ImageLayout((grid, shape), np.stack([ends - shape[1], ends], 1))


def interpolated(numbers: Array, grid: Size) -> TokenRows:
    """Return rows for a ``grid`` to which that of ``numbers [rows, columns]``, rows of the encoder, is scaled.

    Bilinear, as ``torch.nn.functional.interpolate`` without aligned corners, in its precision.
    """
    (down, below, lower), (left, right, farther) = map(_neighbours, numbers.shape, grid)
    corners = [numbers[np.ix_(row, column)] for row in (down, below) for column in (left, right)]
    weights = [row[:, None] * column[None] for row in (1 - lower, lower) for column in (1 - farther, farther)]
    return TokenRows(*(np.stack([part.ravel() for part in parts], 1) for parts in (corners, weights)))


def _neighbours(old: int, new: int) -> tuple[Array, Array, Array]:
    """Return for each of ``new`` places the two of ``old`` places beside it, and the second one's weight, float32."""
    place = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / max(new, 1)) - np.float32(0.5)
    place = np.maximum(place, np.float32(0))
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, max(old - 1, 0)), place - first.astype(np.float32)


def choose_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """Return the (height, width) that shows most of an image of ``size`` (width, height), and then wastes least.

    As transformers' ``select_best_resolution``; the first one wins a draw.
    """

    def merit(resolution: Size) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / size[0], height / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - height * width

    return max(resolutions, key=merit)


def fitted(size: Size, resolution: Size) -> Size:
    """Return the (width, height) of an image of ``size`` (width, height) scaled into ``resolution`` (height, width)."""
    (width, height), (most_height, most_width) = size, resolution
    if most_width / width < most_height / height:
        return most_width, min(math.ceil(height * (most_width / width)), most_height)
    return min(math.ceil(width * (most_height / height)), most_width), most_height


def _without_borders(size: Size, grid: Size) -> tuple[slice, slice]:
    """Return the rows and columns of ``grid`` that show the image, as transformers' ``unpad_image`` cuts them."""
    (width, height), (rows, columns) = size, grid
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(border, rows - border), slice(None)
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(border, columns - border)
