"""What ``--source`` says → where frames come from."""

from __future__ import annotations

import re
from pathlib import Path

from flashvlm_export.errors import ConfigError, UsageError
from flashvlm_export.runtime.live.files import StillPicture, VideoFile
from flashvlm_export.runtime.live.frame import Source
from flashvlm_export.runtime.live.gstreamer import csi, pipeline
from flashvlm_export.runtime.live.streams import camera, network
from flashvlm_export.runtime.video import check_rate
from flashvlm_export.runtime.video_file import PICTURES

_MOST_PIXELS = 16384


def source_from(
    text: str, *, size: tuple[int, int] | None = None, fps: float | None = None, loop: bool = False
) -> Source:
    """Return the source that ``text`` names; nothing is opened yet, but a picture.

    Args:
        text: ``N``, ``/dev/videoN`` or another device, a camera of Video4Linux; ``csi`` or ``csi:N``, a camera on a
            Jetson's ribbon connector; ``gst:PIPELINE``, anything that GStreamer reads; an address; or a file, video or
            picture.
        size: width and height that a camera is asked for.
        fps: frames per second that a camera is asked for, or at which a picture is shown.
        loop: begin a video file again at its end.

    Raises:
        UsageError, ConfigError: if there is no such kind, or a setting is not for this one.
        ImageError, VideoError, DependencyError: if there is no such file, or what reads the source is not installed.
    """
    if fps is not None:
        check_rate(fps)
    if size is not None and not all(1 <= side <= _MOST_PIXELS for side in size):
        raise ConfigError("no camera has frames of this size", received=f"{size[0]} x {size[1]}", expected="1280x720")
    device = re.fullmatch(r"(?:/dev/video)?(\d+)", text)
    sensor = re.fullmatch(r"csi(?::(\d+))?", text)
    picture = "://" not in text and Path(text).suffix.lower() in PICTURES
    its_size, rate, again = size and "--size", fps and "--fps", "--loop" if loop else None
    if device:
        _refuse("a camera", again)
        return camera(f"/dev/video{device[1]}", size=size, fps=fps)
    if text.startswith("/dev/") and Path(text).is_char_device():  # a name that stays, such as below /dev/v4l/by-id
        _refuse("a camera", again)
        return camera(text, size=size, fps=fps)
    if sensor:
        _refuse("a camera", again)
        return csi(int(sensor[1] or 0), size=size, fps=fps)
    if text.startswith("gst:"):
        _refuse("a pipeline, which says so itself,", its_size, rate, again)
        return pipeline(text.removeprefix("gst:"))
    if "://" in text:
        _refuse("a stream", its_size, rate, again)
        return network(text)
    if picture:
        _refuse("a picture", its_size, again)
        return StillPicture(Path(text)) if fps is None else StillPicture(Path(text), fps=fps)
    _refuse("a video file, which has its own,", its_size, rate)
    return VideoFile(Path(text), loop=loop)


def size_from(text: str) -> tuple[int, int]:
    """Return width and height of ``1280x720``; raise :class:`UsageError` for anything else."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not found:
        raise UsageError("this is no size", received=repr(text), expected="WIDTHxHEIGHT, such as 1280x720")
    return int(found[1]), int(found[2])


def _refuse(kind: str, *given: object) -> None:
    unused = [str(option) for option in given if option]
    if unused:
        raise UsageError(
            "this source takes no such settings", received=", ".join(unused), expected=f"{kind} without them"
        )
