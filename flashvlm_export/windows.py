"""An image at its own resolution, as patches in the windows that its encoder attends within (Qwen2.5-VL).

Patches of 14 pixels are merged two by two along each side into visual tokens, and 4 x 4 tokens make a window. What is
missing at the right and lower border is filled up and masked, so that windows are alike and an image is one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flashvlm_export.specs import Array, WindowDims

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class WindowedImage:
    """One image as the encoder takes it.

    Attributes:
        patches: float32 ``[windows, P, V]``: values of each patch, in the order channels, frames, rows, columns; zero
            where there is none.
        positions: int64 ``[windows, P, 2]``: row and column of each patch in the image.
        mask: bool ``[windows, P]``: true where there is a patch.
        order: int64 ``[N]``: place of each visual token, in reading order, among those of all windows.
        grid: rows and columns of visual tokens.
    """

    patches: Array
    positions: Array
    mask: Array
    order: Array
    grid: Size


def in_windows(pixels: Array, dims: WindowDims) -> WindowedImage:
    """Return the image ``pixels`` float32 ``[frames, 3, H, W]``, whose sides are multiples of a visual token's.

    The frames are those that a patch holds; a still image stands for each of them.
    """
    patch, merge, side = dims.patch_size, dims.merge_size, dims.side
    frames, channels, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    down, right = math.ceil(rows / side), math.ceil(columns / side)
    # [frame, channel, token row, patch row in it, pixel row, token column, …] → [token row, token column, patch row,
    # patch column, channel, frame, pixel row, pixel column]
    cut = pixels.reshape(frames, channels, rows, merge, patch, columns, merge, patch).transpose(2, 5, 3, 6, 1, 0, 4, 7)
    values = np.repeat(cut, dims.frames // frames, axis=5).reshape(rows, columns, merge**2, -1)
    places = np.stack(np.meshgrid(np.arange(rows * merge), np.arange(columns * merge), indexing="ij"), -1)
    places = places.reshape(rows, merge, columns, merge, 2).transpose(0, 2, 1, 3, 4).reshape(rows, columns, merge**2, 2)
    border = ((0, down * side - rows), (0, right * side - columns), (0, 0))

    def windows(tokens: Array) -> Array:
        """Pad ``[rows, columns, patches, …]`` and return ``[windows, P, …]``."""
        padded = np.pad(tokens, (*border, *(((0, 0),) * (tokens.ndim - 3))))
        split = padded.reshape(down, side, right, side, *padded.shape[2:])
        moved = split.transpose(0, 2, 1, 3, *range(4, split.ndim))
        return np.ascontiguousarray(moved.reshape(down * right, side * side * merge**2, *tokens.shape[3:]))

    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    window = row // side * right + column // side
    order = (window * side * side + row % side * side + column % side).ravel()
    return WindowedImage(
        windows(values.astype(np.float32, copy=False)),
        windows(places.astype(np.int64)),
        windows(np.ones((rows, columns, merge**2), np.bool_)),
        order.astype(np.int64),
        (rows, columns),
    )
