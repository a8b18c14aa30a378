"""Videos made for the tests: frames of which each is known, and files of them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from flashvlm_export.runtime.video import Video


def frame(number: int, size: tuple[int, int] = (112, 84)) -> Image.Image:
    """Return noise of ``size`` (width, height), other noise for each ``number``."""
    width, height = size
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def clip_of(count: int, *, fps: float = 1.0, size: tuple[int, int] = (112, 84)) -> Video:
    """Return a video of the first ``count`` frames."""
    return Video([frame(number, size) for number in range(count)], fps)


def flat(level: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Return a grey picture, whose level survives a lossy codec."""
    return Image.new("RGB", size, (level, level, level))


def write_video(
    path: Path,
    pictures: Sequence[Image.Image],
    times: Sequence[float],
    codec: str = "mpeg4",
    *,
    rotation: int = 0,
    title: str = "",
) -> Path:
    """Write ``pictures``, each shown from its time in seconds on and turned by ``rotation``; return ``path``."""
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=1000)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for picture, time in zip(pictures, times, strict=True):
            shot = av.VideoFrame.from_image(picture)
            shot.pts, shot.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(shot))
        container.mux(stream.encode(None))
    return path
