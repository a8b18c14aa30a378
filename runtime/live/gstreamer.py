"""Any GStreamer pipeline as a source, in a process of its own that hands raw frames over through a pipe.

``gst-launch-1.0`` is all that is needed of GStreamer: its Python binding comes in no wheel, and a driver that crashes
ends the other process, not this one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import IO

from PIL import Image

from flashvlm_export.errors import DependencyError, UsageError, VideoError
from flashvlm_export.runtime.live.frame import Clock, Frame, Source

Size = tuple[int, int]

_LAUNCH = "gst-launch-1.0"
#: Width and height, and frames per second, of a CSI camera where nothing is said; every sensor for Jetsons has them.
CSI_SIZE, CSI_FPS = (1280, 720), 30.0

# What gst-launch -v says of the frames that reach the pipe, and the first words of what went wrong.
_CAPS = re.compile(r"GstFdSink:frames\.GstPad:sink: caps = video/x-raw\b.*")
_COMPLAINT = re.compile(r"ERROR|WARNING: erroneous|Error|\(Argus\) Error|.*No cameras available")
# Users, passwords and what addresses ask for, in a pipeline or in what is said of it.
_SECRETS = (
    (re.compile(r"://\S*@"), "://…@"),
    (re.compile(r"(://[^\s?]*\?)\S*"), r"\1…"),
    (re.compile(r"\b((?:user-|proxy-)?pw|password|passphrase)=(\"[^\"]*\"|'[^']*'|\S+)"), r"\1=…"),
)
# JetPack's elements, and what is wrong where they are missing.
_NO_JETSON = re.compile(r'no element "nv')
_NO_JETSON_HINT = "this is no Jetson, or a container without its runtime: docker run --runtime nvidia"
_POLL_S = 0.1
_LONGEST_END_S = 2.0
_PIPE_BYTES = 1 << 20


class GStreamer(Source):
    """Runs a pipeline and yields the frames that come out of its end.

    Args:
        name: for people.
        pipeline: arguments of ``gst-launch-1.0``; its last element yields raw RGBA in the memory of the processor.
        ends: whether the end of the pipeline is that of the source; otherwise it broke off.
        paced: whether frames are held back until their time, for pipelines that read faster.
        hint: what to do if it does not deliver.
        clock: see :data:`Clock`.
        silence_s: longest wait for the next frame.

    Raises:
        DependencyError: if there is no ``gst-launch-1.0``.
    """

    reconnects = True

    def __init__(
        self,
        name: str,
        pipeline: Sequence[str],
        *,
        ends: bool,
        paced: bool,
        hint: str,
        clock: Clock = time.monotonic,
        silence_s: float = 10.0,
    ) -> None:
        if shutil.which(_LAUNCH) is None:
            raise DependencyError(
                "this source needs GStreamer",
                received=f"no {_LAUNCH} on the path",
                expected="GStreamer's command-line tools, as JetPack has them",
                hint="sudo apt install gstreamer1.0-tools gstreamer1.0-plugins-good",
            )
        self.name = name
        self._pipeline, self._ends, self._paced, self._hint = list(pipeline), ends, paced, hint
        self._clock, self._silence_s = clock, silence_s

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """Yield frames as they come; see :meth:`Source.frames`."""
        count, at_end = 0, False
        try:
            reader, writer = os.pipe()
        except OSError as error:
            raise self._broken(str(error.strerror), 0) from error
        sink = ["fdsink", "name=frames", f"fd={writer}", f"sync={'true' if self._paced else 'false'}"]
        try:
            process = subprocess.Popen(
                [_LAUNCH, "-v", *self._pipeline, "!", *sink],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                # Ctrl-C in a terminal is for this process, which then ends the other.
                start_new_session=True,
            )
        except OSError as error:  # such as no more processes or memory, which may pass
            os.close(reader)
            raise self._broken(f"{_LAUNCH}: {error.strerror}", 0) from error
        finally:
            os.close(writer)
        assert process.stdout is not None  # it was asked for
        said = _Said(process.stdout)
        try:
            os.set_blocking(reader, False)
            with contextlib.suppress(OSError):  # more than users may have: smaller pieces then
                fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            size = self._size(said, stop)
            while size is not None and (pixels := self._read(reader, 4 * size[0] * size[1], stop)) is not None:
                if said.size != size:
                    raise self._broken("its frames are now of {} x {} pixels".format(*(said.size or size)), count)
                yield Frame(self._clock(), _decoder(size, pixels))
                count += 1
            at_end = not stop.is_set()
        finally:
            os.close(reader)
            finished = _ended(process, waiting=at_end)
            said.thread.join(_LONGEST_END_S)
            process.stdout.close()
        if stop.is_set() or (finished == 0 and count and self._ends):
            return
        raise self._broken(said.complaint or f"it ended with exit code {finished}", count)

    def _size(self, said: _Said, stop: threading.Event) -> Size | None:
        """Return width and height as soon as they are known; ``None`` if the pipeline ends before."""
        deadline_s = time.monotonic() + self._silence_s
        while not said.known.wait(_POLL_S):
            if stop.is_set():
                return None
            if time.monotonic() > deadline_s:
                raise self._broken(f"nothing came for {self._silence_s:g} s", 0)
        return said.size

    def _read(self, reader: int, length: int, stop: threading.Event) -> bytearray | None:
        """Return the next ``length`` bytes; ``None`` if there are no more, or it is to stop."""
        pixels, filled = bytearray(length), 0
        view, deadline_s = memoryview(pixels), time.monotonic() + self._silence_s
        while filled < length:
            if stop.is_set():
                return None
            if not select.select([reader], [], [], _POLL_S)[0]:
                if time.monotonic() > deadline_s:
                    raise self._broken(f"nothing came for {self._silence_s:g} s", 1)
                continue
            came = os.readv(reader, [view[filled:]])
            if not came:
                return None
            filled += came
        return pixels

    def _broken(self, how: str, count: int) -> VideoError:
        return VideoError(
            "the pipeline broke off" if count else "the pipeline delivers no frames",
            received=f"{self.name}: {without_secrets(how)}",
            expected="frames, until it is stopped",
            hint=_NO_JETSON_HINT if _NO_JETSON.search(how) else self._hint,
        )


class _Said:
    """What a pipeline says, read on a thread so that it never waits for a reader.

    Attributes:
        known: set once ``size`` is, or there is nothing more to come.
        size: width and height of the frames; ``None`` before they are known.
        complaint: the first line that tells what went wrong; empty without.
    """

    def __init__(self, text: IO[bytes]) -> None:
        self.known = threading.Event()
        self.size: Size | None = None
        self.complaint = ""
        self._text = text
        self.thread = threading.Thread(target=self._listen, name="flashvlm-gstreamer", daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        for raw in self._text:
            line = raw.decode(errors="replace").strip()
            if found := _CAPS.search(line):
                width, height = (re.search(rf"\b{side}=\(int\)(\d+)", found[0]) for side in ("width", "height"))
                if width and height:
                    self.size = int(width[1]), int(height[1])
                    self.known.set()
            elif not self.complaint and _COMPLAINT.match(line):
                self.complaint = line
        self.known.set()


def csi(sensor: int, *, size: Size | None = None, fps: float | None = None) -> GStreamer:
    """Return a CSI camera of a Jetson, through its image signal processor (``nvarguscamerasrc``)."""
    width, height = size or CSI_SIZE
    rate = f"{round((fps or CSI_FPS) * 1000)}/1000"
    pipeline = [
        *("nvarguscamerasrc", f"sensor-id={sensor}", "!"),
        *(f"video/x-raw(memory:NVMM),format=NV12,width={width},height={height},framerate={rate}", "!"),
        # Out of the image processor's memory, already in the format that the pipe takes.
        *("nvvidconv", "!", "video/x-raw,format=RGBA"),
    ]
    hint = "is the camera plugged in and its driver configured (jetson-io)? sudo systemctl restart nvargus-daemon"
    return GStreamer(f"csi:{sensor}", pipeline, ends=False, paced=False, hint=hint)


def pipeline(description: str) -> GStreamer:
    """Return a pipeline as typed after ``gst-launch-1.0``, up to where a sink would stand; no shell sees it.

    Raises:
        UsageError: if it is empty, or its quotes do not match.
    """
    shown = without_secrets(description)
    try:
        elements = shlex.split(description)
    except ValueError as error:
        raise UsageError(
            "the quotes of the pipeline do not match", received=f"{shown!r}: {error}", expected="pairs of quotes"
        ) from None
    if not elements or elements[-1] == "!":
        raise UsageError(
            "this is no pipeline",
            received=repr(shown),
            expected="elements, without a sink at the end",
            hint="such as: gst:videotestsrc is-live=true",
        )
    end = ["!", "videoconvert", "!", "video/x-raw,format=RGBA"]
    hint = f"try it alone: {_LAUNCH} {shown} ! videoconvert ! fakesink"
    return GStreamer(f"gst:{shown}", [*elements, *end], ends=True, paced=True, hint=hint)


def without_secrets(text: str) -> str:
    """Return a pipeline, or what is said of it, for people: without users, passwords and keys."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def _decoder(size: Size, pixels: bytearray) -> Callable[[], Image.Image]:
    return lambda: Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1).convert("RGB")


def _ended(process: subprocess.Popen[bytes], *, waiting: bool) -> int:
    """Return the exit code of a process that is ``waiting`` for nothing but its own end, or is told to end."""
    if not waiting:
        process.terminate()
    try:
        return process.wait(_LONGEST_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
