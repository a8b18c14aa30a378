"""Which of the encoder's rows an image's visual tokens are, in which order, and which lines they form.

An image is seen as one picture, or, at high resolution, as an overview and tiles (arXiv 2310.03744, LLaVA-NeXT). The
tiles' patches then stand in the prompt line by line across all tiles, without the borders that only fill tiles up, and
each line ends with the model's newline embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashvlm_export.specs import Array

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """The visual tokens of one image before pruning.

    Attributes:
        order: int64 ``[N]``: row of the encoder's output, over all tiles, that each visual token is.
        grids: rows and columns of the grids that the tokens form one after the other, each over the whole picture: that
            of the overview, which has no newlines, and that of the tiles, if any, which has.
    """

    order: Array
    grids: tuple[Size, ...]

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the image (``N``), newlines not counted."""
        return len(self.order)

    @property
    def length(self) -> int:
        """Rows that the image takes in a prompt without pruning: its visual tokens, and newlines."""
        return len(self.order) + sum(rows for rows, _ in self.grids[1:])

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
        if newline is None:
            return tokens, indices
        overview, (rows, columns) = math.prod(self.grids[0]), self.grids[1]
        lines = np.arange(rows)
        if len(indices) < self.num_tokens:
            lines = np.unique((indices[indices >= overview] - overview) // max(columns, 1))
        newlines = overview + lines * (columns + 1) + columns
        places = np.concatenate([self.places_of(indices), newlines])
        order = np.argsort(places)
        return np.concatenate([tokens, np.broadcast_to(newline, (len(lines), len(newline)))])[order], places[order]

    def places_of(self, indices: Array) -> Array:
        """Return int64 ``[K]``: where the visual tokens of ``indices [K]`` stand among all rows of the image."""
        if len(self.grids) == 1:
            return indices
        overview, (_, columns) = math.prod(self.grids[0]), self.grids[1]
        return indices + np.maximum(indices - overview, 0) // max(columns, 1)


def one_picture(grid: Size) -> ImageLayout:
    """Return the layout of an image that is one picture of ``grid`` patch rows and columns."""
    return ImageLayout(np.arange(math.prod(grid), dtype=np.int64), (grid,))


def overview_and_tiles(size: Size, tiles: Size, grid: Size) -> ImageLayout:
    """Return the layout of an image of ``size`` (width, height) seen in ``tiles`` (rows, columns) and an overview.

    Args:
        size: of the image, in pixels.
        tiles: rows and columns of tiles.
        grid: patch rows and columns of a tile.
    """
    per_tile = math.prod(grid)
    # Of [tile rows, tile columns, rows, columns] into lines across all tiles; the overview is the first tile.
    numbers = per_tile + np.arange(math.prod(tiles) * per_tile, dtype=np.int64).reshape(*tiles, *grid)
    lines = numbers.transpose(0, 2, 1, 3).reshape(tiles[0] * grid[0], tiles[1] * grid[1])
    lines = lines[_without_borders(size, lines.shape)]
    return ImageLayout(np.concatenate([np.arange(per_tile), lines.ravel()]), (grid, lines.shape))


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
