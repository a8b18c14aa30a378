"""Frames of a video file, sampled by count or by rate; or of a folder of pictures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from flashvlm_export.errors import ConfigError, DependencyError, VideoError, install_hint
from flashvlm_export.runtime.video import Video, check_frames, check_rate

#: Memory that the sampled frames of one video may take once decoded.
MOST_BYTES = 1 << 30
#: How names of pictures end.
PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# Frames of a file where nothing is said.
_FRAMES = 16
_FEWER = "take fewer with --frames N, or a lower --fps"
_CONVERT = "convert it: ffmpeg -i FILE out.mp4"


def read_video(path: str | Path, *, frames: int | None = None, fps: float | None = None) -> Video:
    """Return frames of a file, or of a folder of pictures.

    Args:
        path: a video in any format that FFmpeg reads, on this machine; or a folder, whose pictures are taken in the
            order of their names.
        frames: how many, spread over the whole length; the first of as many equal parts each. Without ``fps`` too, 16
            of a file, or all if it has fewer, and all of a folder.
        fps: how many per second of the file. Of a folder, the rate at which its pictures were taken (default: 1).

    Raises:
        ConfigError: if both are given for a file, or one is out of range.
        VideoError: if there is no video, it has fewer frames than asked for, more than fit, or broken ones.
        DependencyError: if PyAV is not installed.
    """
    if frames is not None:
        check_frames(frames)
    if fps is not None:
        check_rate(fps)
    try:
        kind = "folder" if path and Path(path).is_dir() else "file" if path and Path(path).is_file() else ""
    except (OSError, ValueError) as error:  # not allowed to look; a name too long, or with a null character
        raise VideoError("there is no video file at this path", received=f"{path!r}: {error}") from None
    if kind == "folder":
        return _from_folder(Path(path), frames, fps)
    if frames is not None and fps is not None:
        raise ConfigError(
            "frames are taken by count or by rate", received=f"frames {frames}, fps {fps}", expected="one of them"
        )
    if kind != "file":
        raise VideoError("there is no video file at this path", received=repr(path), expected="one on this machine")
    return _from_file(Path(path), frames, fps)


def _from_folder(path: Path, count: int | None, fps: float | None) -> Video:
    pictures = sorted(
        file for file in path.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")
    )
    count = len(pictures) if count is None else count
    if not 1 <= count <= len(pictures):
        raise VideoError(
            "the folder has too few pictures",
            received=f"{path}: {len(pictures)}",
            expected=f"at least {max(count, 1)} of {', '.join(sorted(PICTURES))}",
        )
    chosen = [pictures[number * len(pictures) // count] for number in range(count)]
    return Video(chosen, (fps or 1.0) * count / len(pictures))


def _from_file(path: Path, count: int | None, fps: float | None) -> Video:
    with opened_video(path) as container:
        unit, times = container.streams.video[0].time_base, _times(path, container)
    places, rate = _sampled(path, [float(time * unit) for time in times], count, fps)
    # Opened anew: to go back to the beginning is not possible in every format.
    with opened_video(path) as container:
        return Video(_decoded(path, container, unit, [times[place] for place in places]), rate)


@contextmanager
def opened_video(path: Path) -> Iterator[Any]:
    """Open a file with PyAV; raise :class:`VideoError` for one that has no video, or that cannot be read."""
    try:
        import av
    except ImportError as error:
        raise DependencyError("reading videos needs PyAV", received=str(error), hint=install_hint("video")) from error
    # Through Python's own file, and no protocol: what a file refers to is not opened.
    options = {"protocol_whitelist": "none"}
    try:
        with path.open("rb") as stream, av.open(stream, "r", options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                kinds = ", ".join(stream.type for stream in container.streams) or "no stream at all"
                raise VideoError("the file has no video", received=f"{path}: {kinds}", expected="a video stream")
            yield container
    except av.FFmpegError as error:
        raise VideoError(
            "this is not a video that can be read",
            received=f"{path}: {error.strerror}",
            expected="a whole file in a format that FFmpeg reads",
            hint=f"copy it again, or {_CONVERT}",
        ) from error
    except OSError as error:
        raise VideoError(
            "the video cannot be read", received=f"{path}: {error.strerror or error}", expected="a whole file"
        ) from error


def _times(path: Path, container: Any) -> list[int]:
    """Return the time of every frame that is shown, ascending, in the stream's unit, without decoding any."""
    packets = [packet for packet in container.demux(video=0) if packet.size and not packet.is_discard]
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    if not times:
        raise VideoError(
            "the video has no frames" if not packets else "the video does not say when its frames are shown",
            received=str(path),
            expected="frames with times",
            hint=_CONVERT,
        )
    return times


def _sampled(path: Path, seconds: Sequence[float], count: int | None, fps: float | None) -> tuple[list[int], float]:
    """Return which frames are taken, and how many they are per second.

    A frame is shown until the next one comes, however long that takes: of variable rate too, what is taken is what one
    would see at the time.
    """
    total = len(seconds)
    length = (seconds[-1] - seconds[0]) * total / (total - 1) if total > 1 else 1 / (fps or 1.0)
    if fps is None:
        count = min(_FRAMES, total) if count is None else count
        if count > total:
            raise VideoError(
                "the video has fewer frames than asked for",
                received=f"{count} of {path}, {length:.1f} s long",
                expected=f"at most {total}",
                hint=_FEWER,
            )
        fps = count / length if length else 1.0
    else:
        count = max(1, math.floor(length * fps + 1e-6))
        check_frames(count)
    shown = [seconds[0] + number / fps for number in range(count)]
    return [max(0, bisect_right(seconds, time + 1e-6) - 1) for time in shown], fps


def _decoded(path: Path, container: Any, unit: Fraction, wanted: Sequence[int]) -> list[Image.Image]:
    """Return the frames of the ``wanted`` times, turned upright."""
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    found: dict[int, Image.Image] = {}
    missing, last = sorted(set(wanted)), None
    try:
        for frame in container.decode(stream):
            if frame.pts is None or (last is not None and frame.pts < last):
                raise VideoError(
                    "the frames of the video are not in order",
                    received=f"{path}: time {frame.pts} behind {last}",
                    expected="a file that says when each frame is shown",
                    hint=f"put it into another container: ffmpeg -i FILE -c copy out.mp4; or {_CONVERT}",
                )
            last = frame.pts
            if frame.pts not in missing:
                continue
            size_bytes = 3 * frame.width * frame.height * (len(missing) + len(found))
            if size_bytes > MOST_BYTES:
                raise VideoError(
                    "the frames do not fit into memory",
                    received=f"{len(missing) + len(found)} of {frame.width} x {frame.height} pixels",
                    expected=f"at most {MOST_BYTES >> 20} MiB",
                    hint=_FEWER,
                )
            if frame.is_corrupt:
                raise broken_frame(path, float(frame.pts * unit), "it is damaged")
            found[frame.pts] = frame.to_image().rotate(frame.rotation, expand=True)
            missing.remove(frame.pts)
            if not missing:
                break
    except av.FFmpegError as error:
        raise broken_frame(path, float(missing[0] * unit), str(error.strerror)) from error
    if missing:
        raise broken_frame(path, float(missing[0] * unit), "it is missing")
    return [found[time] for time in wanted]


def broken_frame(path: Path, seconds: float, how: str) -> VideoError:
    """Return the error for a file that is broken at ``seconds``."""
    return VideoError(
        "a frame of the video is broken",
        received=f"{path}, the frame at {seconds:.2f} s or before: {how}",
        expected="a whole video",
        hint="copy it again, or repair it: ffmpeg -err_detect ignore_err -i FILE out.mp4",
    )
