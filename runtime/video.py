"""Frames that belong together: a video, and the newest frames of a stream."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from flashvlm_export.errors import ConfigError, VideoError
from flashvlm_export.runtime.images import ImageSource, load_image

#: Frames of one video at most; as many as Qwen2.5-VL's own processor takes.
MOST_FRAMES = 768
#: Frames per second, least and most: one in about a quarter of an hour, and one each millisecond.
RATES = (1e-3, 1e3)


@dataclass(frozen=True, eq=False)
class Video:
    """Frames in the order of time.

    Attributes:
        frames: one or more; whatever :func:`load_image` reads. Of a file, :func:`read_video` takes them.
        fps: how many of them there are per second.

    Raises:
        VideoError: if these are no frames.
        ConfigError: if there are none or too many, or ``fps`` is out of range.
    """

    frames: Sequence[ImageSource]
    fps: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.frames, (str, bytes, os.PathLike)):
            raise VideoError(
                "these are not the frames of a video",
                received=repr(self.frames)[:80],
                expected="a list of images",
                hint="read_video(path, frames=16) takes them from a file",
            )
        check_frames(len(self.frames))
        check_rate(self.fps)


class FrameWindow:
    """The newest frames of a stream as a video, one frame after the other.

    Frames that the encoder sees together stay together: the oldest leave in whole moments, so that a pipeline with
    selectors, which remembers what it encoded, encodes for each new frame one moment and no more.

    Args:
        frames: of the window, at most; a multiple of ``frames_per_moment``.
        fps: of the stream, as it is given to :meth:`push`.
        frames_per_moment: of the bundle's manifest (``manifest.video.frames_per_moment``).

    Raises:
        ConfigError: if a setting is out of range, or the window does not hold whole moments.
    """

    def __init__(self, frames: int, fps: float, frames_per_moment: int = 1) -> None:
        check_frames(frames)
        check_rate(fps)
        if frames_per_moment < 1 or frames % frames_per_moment:
            raise ConfigError(
                "the window does not hold whole moments",
                received=f"{frames} frames, {frames_per_moment} to a moment",
                expected="a multiple",
            )
        self.most, self.fps, self.frames_per_moment = frames, fps, frames_per_moment
        self._frames: deque[Image.Image] = deque()

    def push(self, frame: ImageSource) -> Video:
        """Take the newest frame in, drop what is too old, and return the window as a video.

        Raises:
            ImageError: if the frame cannot be read; the window is then as it was.
        """
        image = load_image(frame)
        if len(self._frames) == self.most:
            for _ in range(self.frames_per_moment):
                self._frames.popleft()
        self._frames.append(image)
        return Video(tuple(self._frames), self.fps)


def check_frames(count: int) -> None:
    """Raise :class:`ConfigError` unless a video can have so many frames."""
    if not isinstance(count, int) or not 1 <= count <= MOST_FRAMES:
        raise ConfigError(
            f"a video is 1 to {MOST_FRAMES} frames",
            received=f"{count} frames",
            hint="take fewer with --frames N, or a lower --fps" if isinstance(count, int) and count > 1 else None,
        )


def check_rate(fps: float) -> None:
    """Raise :class:`ConfigError` unless there can be so many frames per second."""
    if not isinstance(fps, (int, float)) or not RATES[0] <= fps <= RATES[1]:
        raise ConfigError(
            "the frames per second are out of range",
            received=repr(fps),
            expected=f"{RATES[0]:g} to {RATES[1]:g}, such as 2",
        )


def frames_differ(sizes: Sequence[str]) -> VideoError:
    """Return the error for frames of several ``sizes``."""
    return VideoError(
        "the frames of a video differ in size",
        received=", ".join(dict.fromkeys(sizes)),
        expected="one size",
        hint="ask about them as images, or scale them to one size",
    )
