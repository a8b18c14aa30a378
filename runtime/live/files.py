"""Files in the place of a camera: a video at its own pace, a still picture again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from flashvlm_export.errors import VideoError
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.live.frame import Clock, Frame, Source
from flashvlm_export.runtime.video_file import broken_frame, opened_video

# Where a file does not say how often its frames come.
_USUAL_RATE = Fraction(25)


class VideoFile(Source):
    """A video file, each frame at its time: what nobody asks about in time is gone, as with a camera.

    Args:
        path: in any format that FFmpeg reads.
        loop: begin again at its end, instead of ending.
        clock: see :data:`Clock`.

    Raises:
        VideoError: if there is no such file.
    """

    def __init__(self, path: Path, *, loop: bool = False, clock: Clock = time.monotonic) -> None:
        try:
            found = path.is_file()
        except (OSError, ValueError) as error:  # not allowed to look; a name too long, or with a null character
            raise VideoError("there is no video file at this path", received=f"{str(path)!r}: {error}") from None
        if not found:
            raise VideoError(
                "there is no such source",
                received=repr(str(path)),
                expected="a file on this machine, 0 or /dev/videoN, rtsp://…, http://…, csi, or gst:PIPELINE",
            )
        self.name = str(path)
        self._path, self._loop, self._clock = path, loop, clock

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """Yield frames, none before its time; see :meth:`Source.frames`."""
        while True:
            yield from self._once(stop)
            if not self._loop or stop.is_set():
                return

    def _once(self, stop: threading.Event) -> Generator[Frame, None, None]:
        begin_s = self._clock()
        at_s, first, count = 0.0, None, 0
        with opened_video(self._path) as container:
            import av

            stream = container.streams.video[0]
            interval = float(1 / (stream.average_rate or _USUAL_RATE))
            stream.thread_type = "AUTO"
            try:
                for shot in container.decode(stream):
                    at_s = count * interval if shot.pts is None else float(shot.pts * stream.time_base)
                    first = at_s if first is None else first
                    if shot.is_corrupt:
                        raise broken_frame(self._path, at_s, "it is damaged")
                    if stop.wait(max(0.0, begin_s + at_s - first - self._clock())):
                        return
                    yield Frame(self._clock(), partial(upright, shot))
                    count += 1
            except av.FFmpegError as error:
                raise broken_frame(self._path, at_s, str(error.strerror)) from error
        if not count:
            raise VideoError("the video has no frames", received=str(self._path), expected="one or more")
        stop.wait(interval)  # the last frame is shown as long as the others


class StillPicture(Source):
    """One picture, shown ``fps`` times per second for ever.

    Raises:
        ImageError: if it cannot be read.
    """

    def __init__(self, path: Path, *, fps: float = 5.0, clock: Clock = time.monotonic) -> None:
        self.name = str(path)
        self._picture, self._interval, self._clock = load_image(path), 1 / fps, clock

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """Yield the picture; see :meth:`Source.frames`."""
        while not stop.is_set():
            yield Frame(self._clock(), lambda: self._picture)
            stop.wait(self._interval)


def upright(shot: Any) -> Image.Image:
    """Return a decoded frame of PyAV as a picture, turned as it says."""
    picture: Image.Image = shot.to_image()
    return picture.rotate(shot.rotation, expand=True) if shot.rotation else picture
