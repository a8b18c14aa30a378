"""A picture of what selection did: the score over the image, and the kept patches on a dimmed one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flashvlm_export.errors import ConfigError
from flashvlm_export.files import atomic_write
from flashvlm_export.specs import Array

_SIDE = 504
_GAP = 12
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: Endings of the names of pictures that can be written.
PICTURE_SUFFIXES = tuple(_FORMATS)
# Dark to bright through blue, red and yellow; readable in grey too, because lightness rises all the way.
_STOPS = np.array([[0, 0, 4], [60, 15, 112], [158, 44, 98], [229, 92, 48], [251, 180, 26], [252, 255, 164]])


def draw_selection(
    views: Sequence[Image.Image], indices: Array, scores: Array, grids: Sequence[tuple[int, int]], caption: str
) -> Image.Image:
    """Return two panels beside each other, or two for each grid, with a caption below.

    Args:
        views: the picture that the encoder saw, or one for each moment of a video, all of one size.
        indices: int ``[K]``: kept visual tokens.
        scores: float ``[N]``: score of each.
        grids: rows and columns of the grids that the tokens form one after the other, each over a whole picture; see
            :class:`ImageLayout`.
        caption: one or more lines, such as question and answer, wrapped to the width.
    """
    if sum(rows * columns for rows, columns in grids) != len(scores):
        raise ConfigError("scores do not fill the patch grids", received=len(scores), expected=grids)
    scale = _SIDE / max(views[0].size)
    size = (max(1, round(views[0].width * scale)), max(1, round(views[0].height * scale)))
    shown_pixels = [np.asarray(view.resize(size, Image.Resampling.LANCZOS), np.float32) for view in views]

    # Ranks, not scores: a handful of patches holds nearly all of the score. Those of moments do not compare.
    ends = np.cumsum([rows * columns for rows, columns in grids])[:-1]
    ranked = np.split(scores, ends) if len(views) > 1 else [scores]
    heat = np.concatenate([_colour(np.argsort(np.argsort(part)) / max(1, len(part) - 1)) for part in ranked])
    kept = np.zeros(len(scores), np.float32)
    kept[indices] = 1

    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, 120)] or [""]
    shown = [grid for grid in grids if 0 not in grid]
    font = ImageFont.load_default(15)
    step = size[1] + _GAP + 24
    height = _GAP + step * len(shown) + _GAP + 16 + 20 * len(lines)
    sheet = Image.new("RGB", (2 * _SIDE + 3 * _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    first = 0
    for number, (rows, columns) in enumerate(shown):
        part = slice(first, first + rows * columns)
        first = part.stop
        pixels = shown_pixels[min(number, len(shown_pixels) - 1)]
        left = 0.35 * pixels + 0.65 * upsample(heat[part].reshape(rows, columns, 3), size)
        mask = upsample(kept[part].reshape(rows, columns, 1), size)
        right = np.where(mask > 0, pixels, 0.18 * pixels + 0.05 * 255)
        of_it = "" if len(shown) == 1 else f", {'overview' if number == 0 else 'tiles'}"
        of_it = f", moment {number + 1}" if len(views) > 1 else of_it
        titles = (f"score, by rank{of_it}", f"kept: {int(kept[part].sum())} of {rows * columns} visual tokens{of_it}")
        for column, (panel, title) in enumerate(zip((left, right), titles, strict=True)):
            corner = (_GAP + column * (_SIDE + _GAP), _GAP + number * step)
            draw.text(corner, title, "black", font)
            sheet.paste(Image.fromarray(panel.clip(0, 255).astype(np.uint8)), (corner[0], corner[1] + 24))
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + step * len(shown) + 20 * number), line, "black", font)
    return sheet


def check_picture_path(path: Path) -> None:
    """Raise :class:`ConfigError` unless a picture can be written to ``path``."""
    if path.suffix.lower() not in _FORMATS:
        endings = ", ".join(PICTURE_SUFFIXES)
        raise ConfigError("unknown picture format", received=path.name, expected=f"a name ending in {endings}")
    if not path.absolute().parent.is_dir():
        raise ConfigError("the picture's folder does not exist", received=str(path), hint="make the folder first")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write ``picture`` atomically, in the format of ``path``'s suffix."""
    check_picture_path(path)
    try:
        with atomic_write(path) as temporary:
            picture.save(temporary, _FORMATS[path.suffix.lower()])
    except ValueError as error:
        raise ConfigError(
            "the picture does not fit into this format",
            received=f"{path.name}: {error}",
            expected="a name ending in .png",
        ) from error


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return ``pictures`` below each other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def _colour(values: Array) -> Array:
    place = values * (len(_STOPS) - 1)
    low = np.minimum(place.astype(int), len(_STOPS) - 2)
    part = (place - low)[:, None]
    colours: Array = _STOPS[low] * (1 - part) + _STOPS[low + 1] * part
    return colours


def upsample(cells: Array, size: tuple[int, int]) -> Array:
    """Return ``cells [rows, columns, …]`` as ``[height, width, …]`` of a picture of ``size`` (width, height)."""
    ys = np.arange(size[1]) * cells.shape[0] // size[1]
    xs = np.arange(size[0]) * cells.shape[1] // size[0]
    upsampled: Array = cells[ys[:, None], xs[None]]
    return upsampled
