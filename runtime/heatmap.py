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
_SUFFIXES = ", ".join(_FORMATS)
# Dark to bright through blue, red and yellow; readable in grey too, because lightness rises all the way.
_STOPS = np.array([[0, 0, 4], [60, 15, 112], [158, 44, 98], [229, 92, 48], [251, 180, 26], [252, 255, 164]])


def draw_selection(
    view: Image.Image, indices: Array, scores: Array, grid: tuple[int, int], caption: str
) -> Image.Image:
    """Return two panels beside each other, with a caption below.

    Args:
        view: the picture that the encoder saw.
        indices: int ``[K]``: kept patches.
        scores: float ``[N]``: score of each patch.
        grid: patch rows and columns, ``N`` = rows × columns.
        caption: one or more lines, such as question and answer, wrapped to the width.
    """
    rows, columns = grid
    if rows * columns != len(scores):
        raise ConfigError("scores do not fill the patch grid", received=len(scores), expected=f"{rows} x {columns}")
    base = view.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(base, np.float32)

    # Ranks, not scores: a handful of patches holds nearly all of the score.
    ranks = np.argsort(np.argsort(scores)) / max(1, len(scores) - 1)
    heat = _upsample(_colour(ranks).reshape(rows, columns, 3))
    left = 0.35 * pixels + 0.65 * heat

    kept = np.zeros(len(scores), bool)
    kept[indices] = True
    mask = _upsample(kept.reshape(rows, columns, 1).astype(np.float32))
    right = np.where(mask > 0, pixels, 0.18 * pixels + 0.05 * 255)

    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, 120)] or [""]
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (2 * _SIDE + 3 * _GAP, _SIDE + 3 * _GAP + 40 + 20 * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    titles = ("score, by rank", f"kept: {len(indices)} of {len(scores)} visual tokens")
    for number, (panel, title) in enumerate(zip((left, right), titles, strict=True)):
        x = _GAP + number * (_SIDE + _GAP)
        draw.text((x, _GAP), title, "black", font)
        sheet.paste(Image.fromarray(panel.clip(0, 255).astype(np.uint8)), (x, _GAP + 24))
    for number, line in enumerate(lines):
        draw.text((_GAP, _SIDE + 2 * _GAP + 24 + 20 * number), line, "black", font)
    return sheet


def check_picture_path(path: Path) -> None:
    """Raise :class:`ConfigError` unless a picture can be written to ``path``."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError("unknown picture format", received=path.name, expected=f"a name ending in {_SUFFIXES}")
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


def _upsample(cells: Array) -> Array:
    ys = np.arange(_SIDE) * cells.shape[0] // _SIDE
    xs = np.arange(_SIDE) * cells.shape[1] // _SIDE
    upsampled: Array = cells[ys[:, None], xs[None]]
    return upsampled
