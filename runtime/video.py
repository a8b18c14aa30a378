"""Videos as frames: from a file, sampled by count or by rate; from pictures; or the newest ones of a stream."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from flashvlm_export.errors import ConfigError, DependencyError, VideoError, install_hint
from flashvlm_export.runtime.images import ImageSource

#: Frames of one video at most; as many as Qwen2.5-VL's own processor takes.
MOST_FRAMES = 768
#: Memory that the sampled frames of one video may take once decoded.
MOST_BYTES = 2 << 30

_FEWER = "take fewer with --frames N, or a lower --fps"


@dataclass(frozen=True, eq=False)
class Video:
    """Frames that belong together, in the order of time.

    Attributes:
        frames: one or more, all of one size; whatever :func:`load_image` reads.
        fps: how many of them there are per second.

    Raises:
        VideoError: if there is none.
        ConfigError: if ``fps`` is not positive.
    """

    frames: Sequence[ImageSource]
    fps: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.frames) <= MOST_FRAMES:
            raise VideoError(
                "a video has some frames",
                received=f"{len(self.frames)} frames",
                expected=f"1 to {MOST_FRAMES}",
                hint=_FEWER if self.frames else None,
            )
        if not 0 < self.fps < float("inf"):
            raise ConfigError("frames per second are more than none", received=self.fps, expected="such as 2")


class FrameWindow:
    """The newest frames of a stream as a video, one frame after the other.

    Frames that the encoder sees together stay together: the oldest leave in whole moments, so that a pipeline with
    selectors, which remembers what it encoded, encodes for each new frame one moment and no more.

    Args:
        frames: of the window, at most; a multiple of ``frames_per_moment``.
        fps: of the stream, as it is given to :meth:`push`.
        frames_per_moment: of the bundle's manifest (``manifest.video.frames_per_moment``).
    """

    def __init__(self, frames: int, fps: float, frames_per_moment: int = 1) -> None:
        if frames < 1 or frames % frames_per_moment:
            raise ConfigError(
                "the window does not hold whole moments",
                received=f"{frames} frames",
                expected=f"a multiple of {frames_per_moment}",
            )
        self.most, self.fps, self.frames_per_moment = frames, fps, frames_per_moment
        self._frames: deque[ImageSource] = deque()

    def push(self, frame: ImageSource) -> Video:
        """Take the newest frame in, drop what is too old, and return the window as a video."""
        if len(self._frames) == self.most:
            for _ in range(self.frames_per_moment):
                self._frames.popleft()
        self._frames.append(frame)
        return Video(tuple(self._frames), self.fps)


def read_video(path: str | Path, *, frames: int | None = None, fps: float | None = None) -> Video:
    """Return frames of a file, or of a folder of pictures.

    Args:
        path: a video in any format that FFmpeg reads, on this machine; or a folder, whose pictures are taken in the
            order of their names.
        frames: how many, spread over the whole length; the first of as many equal parts each.
        fps: how many per second of the file. Of a folder, the rate at which its pictures were taken (default: 1).

    Raises:
        ConfigError: unless one of ``frames`` and ``fps`` is given for a file, or one is out of range.
        VideoError: if there is no video, it has fewer frames than asked for, more than fit, or broken ones.
        DependencyError: if PyAV is not installed.
    """
    if frames is not None and not 1 <= frames <= MOST_FRAMES:
        raise ConfigError("this is no number of frames", received=frames, expected=f"1 to {MOST_FRAMES}")
    if fps is not None and not 0 < fps < float("inf"):
        raise ConfigError("frames per second are more than none", received=fps, expected="such as 2")
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, frames, fps)
    if (frames is None) == (fps is None):
        raise ConfigError(
            "frames are taken by count or by rate", received=f"frames {frames}, fps {fps}", expected="one of them"
        )
    if not path.is_file():
        raise VideoError("there is no video file at this path", received=str(path), expected="a file on this machine")
    return _from_file(path, frames, fps)


def frames_differ(sizes: Sequence[str]) -> VideoError:
    """Return the error for frames of several ``sizes``."""
    return VideoError(
        "the frames of a video differ in size",
        received=", ".join(dict.fromkeys(sizes)),
        expected="one size",
        hint="ask about them as images, or scale them to one size",
    )


def _from_folder(path: Path, count: int | None, fps: float | None) -> Video:
    known = Image.registered_extensions()
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in known)
    count = len(pictures) if count is None else count
    if not 1 <= count <= len(pictures):
        raise VideoError(
            "the folder has too few pictures", received=f"{path}: {len(pictures)}", expected=f"at least {max(count, 1)}"
        )
    chosen = [pictures[number * len(pictures) // count] for number in range(count)]
    return Video(chosen, (fps or 1.0) * count / len(pictures))


def _from_file(path: Path, count: int | None, fps: float | None) -> Video:
    try:
        import av
    except ImportError as error:
        raise DependencyError("reading videos needs PyAV", received=str(error), hint=install_hint("video")) from error
    try:
        # Through Python's own file, and no protocol: what a file refers to is not opened.
        options = {"protocol_whitelist": "none"}
        with path.open("rb") as stream, av.open(stream, mode="r", options=options) as container:
            if not container.streams.video:
                raise VideoError("the file has no video", received=f"{path}: {_kinds(container)}")
            times = _times(container)
            places, rate = _sampled(path, [float(time * _unit(container)) for time in times], count, fps)
            container.seek(0)
            return Video(_decoded(path, container, [times[place] for place in places]), rate)
    except av.FFmpegError as error:
        raise VideoError(
            "this is not a video that can be read",
            received=f"{path}: {error.strerror}",
            expected="a whole file in a format that FFmpeg reads",
            hint="copy it again, or convert it: ffmpeg -i FILE out.mp4",
        ) from error
    except OSError as error:
        raise VideoError("the video cannot be read", received=f"{path}: {error.strerror or error}") from error


def _kinds(container: Any) -> str:
    return ", ".join(stream.type for stream in container.streams) or "no stream at all"


def _unit(container: Any) -> Fraction:
    """Return the seconds that times of the stream count in."""
    unit: Fraction = container.streams.video[0].time_base
    return unit


def _times(container: Any) -> list[int]:
    """Return the time of every frame, ascending, without decoding any."""
    stream = container.streams.video[0]
    return sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size)


def _sampled(path: Path, seconds: Sequence[float], count: int | None, fps: float | None) -> tuple[list[int], float]:
    """Return which frames are taken, and how many they are per second.

    A frame is shown until the next one comes, however long that takes: of variable rate too, what is taken is what one
    would see at the time.
    """
    total = len(seconds)
    if not total:
        raise VideoError("the video has no frames", received=str(path))
    length = (seconds[-1] - seconds[0]) * total / (total - 1) if total > 1 else 1 / (fps or 1.0)
    if count is None:
        assert fps is not None  # one of them is given
        count, rate = max(1, math.floor(length * fps + 1e-6)), fps
    else:
        rate = count / length
    if count > min(total, MOST_FRAMES):
        raise VideoError(
            "the video has fewer frames than asked for" if count > total else "these are too many frames",
            received=f"{count} of {path}, {length:.1f} s long",
            expected=f"at most {min(total, MOST_FRAMES)}",
            hint=_FEWER,
        )
    shown = [seconds[0] + number / rate for number in range(count)]
    return [max(0, bisect_right(seconds, time + 1e-6) - 1) for time in shown], rate


def _decoded(path: Path, container: Any, wanted: Sequence[int]) -> list[Image.Image]:
    """Return the frames of the ``wanted`` times, upright."""
    import av

    stream, unit = container.streams.video[0], _unit(container)
    stream.thread_type = "AUTO"
    found: dict[int, Image.Image] = {}
    missing, size_bytes = sorted(set(wanted)), 0
    try:
        for frame in container.decode(stream):
            if frame.pts not in missing:
                continue
            size_bytes += 3 * frame.width * frame.height
            if size_bytes > MOST_BYTES:
                raise VideoError(
                    "the frames do not fit into memory",
                    received=f"{len(set(wanted))} of {frame.width} x {frame.height} pixels",
                    expected=f"at most {MOST_BYTES >> 20} MiB",
                    hint=_FEWER,
                )
            if frame.is_corrupt:
                raise _broken(path, float(frame.pts * unit), "it is damaged")
            found[frame.pts] = frame.to_image().rotate(frame.rotation, expand=True)
            missing.remove(frame.pts)
            if not missing:
                break
    except av.FFmpegError as error:
        raise _broken(path, float(missing[0] * unit), str(error.strerror)) from error
    if missing:
        raise _broken(path, float(missing[0] * unit), "it is missing")
    return [found[time] for time in wanted]


def _broken(path: Path, seconds: float, how: str) -> VideoError:
    return VideoError(
        "a frame of the video is broken",
        received=f"{path}, the frame at {seconds:.2f} s or before: {how}",
        expected="a whole video",
        hint="copy it again, or repair it: ffmpeg -err_detect ignore_err -i FILE out.mp4",
    )
