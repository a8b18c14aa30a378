"""A frame with dropped visual tokens dimmed and kept ones outlined, by itself or with the words below."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flashvlm_export.runtime.heatmap import upsample
from flashvlm_export.runtime.live.watch import Seen
from flashvlm_export.specs import Array

# Longer side of the frame, and least width of the words below it, in pixels. Even: video codecs halve them.
_SIDE, _LEAST_WIDTH = 640, 480
_MARGIN, _LINE = 12, 26
_GROUND, _QUIET, _ANSWER, _NUMBERS = (16, 16, 16), (185, 185, 185), (255, 255, 255), (251, 180, 26)
# Always as many lines, so that all pictures of a run have one size: of the question, the answer, and the numbers.
_LINES = (2, 3, 2)


def draw_frame(seen: Seen) -> Image.Image:
    """Return the frame of ``seen`` with kept tokens; RGB, sides even."""
    scale = _SIDE / max(seen.view.size)
    size = _even(seen.view.width * scale), _even(seen.view.height * scale)
    pixels = np.asarray(seen.view.resize(size, Image.Resampling.BILINEAR))
    kept = _kept(seen, size)
    shown = np.where(kept[:, :, None], pixels, pixels // 3)
    shown[_outline(kept)] = _NUMBERS
    return Image.fromarray(shown)


def with_words(frame: Image.Image, seen: Seen, question: str) -> Image.Image:
    """Return ``frame``, as drawn of ``seen``, above question, answer and statistics; RGB, sides even."""
    width = max(frame.width, _LEAST_WIDTH)
    sheet = Image.new("RGB", (width, frame.height + 2 * _MARGIN + sum(_LINES) * _LINE), _GROUND)
    sheet.paste(frame, ((width - frame.width) // 2, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    top = frame.height + _MARGIN
    texts = (question, seen.answer.text, numbers(seen))
    for text, count, colour in zip(texts, _LINES, (_QUIET, _ANSWER, _NUMBERS), strict=True):
        for row, line in enumerate(wrapped(text, width - 2 * _MARGIN, count, font)):
            draw.text((_MARGIN, top + row * _LINE), line, colour, font)
        top += count * _LINE
    return sheet


def jpeg_of(picture: Image.Image) -> bytes:
    """Return ``picture`` as a JPEG file."""
    stream = BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def numbers(seen: Seen) -> str:
    """Return what was kept and measured, in words."""
    prompt, now = seen.answer.prompt, seen.statistics
    fps = "" if now.source_fps is None else f"source {now.source_fps:.1f} frames/s, "
    return (
        f"kept {prompt.visual_tokens_kept} of {prompt.visual_tokens_before} tokens, latency {seen.latency_ms:.0f} ms, "
        f"{fps}{now.answers_per_second:.1f} answers/s, {now.dropped} dropped"
    )


def wrapped(text: str, width: float, lines: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Return ``text`` in at most so many ``lines`` of ``width`` pixels; what does not fit ends with an ellipsis.

    A word that is wider than a line, as in languages without spaces, is broken anywhere.
    """
    done, line = [], ""
    for word in text.split():
        spaced = f"{line} {word}" if line else word
        if font.getlength(spaced) <= width:
            line = spaced
            continue
        if line:
            done.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                done.append(line)
                line = ""
            line += letter
        if len(done) > lines:
            break
    done += [line] if line else []
    if len(done) <= lines:
        return done
    last = done[lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*done[: lines - 1], last + "…"]


def _kept(seen: Seen, size: tuple[int, int]) -> Array:
    """Return bool ``[height, width]``: where visual tokens are kept, on the overview or on the tiles.

    Of a window only its last moment is shown, the newest.
    """
    grids, offset = seen.kept.layout.grids, 0
    if seen.kept.layout.times:
        offset = sum(rows * columns for rows, columns in grids[:-1])
        grids = grids[-1:]
    flags = np.zeros(seen.kept.layout.num_tokens, bool)
    flags[seen.kept.indices] = True
    kept = np.zeros((size[1], size[0]), bool)
    for rows, columns in (grid for grid in grids if 0 not in grid):
        kept |= upsample(flags[offset : offset + rows * columns].reshape(rows, columns), size)
        offset += rows * columns
    return kept


def _outline(kept: Array) -> Array:
    """Return bool ``[height, width]``: the rim, two pixels wide, of what is kept."""
    inside = kept.copy()
    for axis in (0, 1):
        for step in (-2, 2):
            moved = np.roll(kept, step, axis)
            # What comes round from the other side is no neighbour: the picture's own border gets no rim.
            edge = [slice(None), slice(None)]
            edge[axis] = slice(0, step) if step > 0 else slice(step, None)
            moved[tuple(edge)] = True
            inside &= moved
    return kept & ~inside


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))
