"""Annotated pictures → a video file, or the newest one in a picture file."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image, ImageOps

from flashvlm_export.errors import ConfigError, DependencyError, StorageError, install_hint
from flashvlm_export.files import atomic_write, storage_errors
from flashvlm_export.runtime.heatmap import PICTURE_SUFFIXES, check_picture_path, save_picture

_FORMATS = {".mp4": "mp4", ".mkv": "matroska"}
# H.264 plays in browsers; builds of FFmpeg without it have the older one.
_CODECS = {"libx264": {"preset": "veryfast", "crf": "23"}, "mpeg4": {"qscale": "4"}}
# How long the last picture is shown.
_LAST_MS = 1000


class Output(ABC):
    """Takes pictures in the order of their times; ``with`` finishes it, whatever ended the run."""

    @abstractmethod
    def add(self, picture: Image.Image, at_s: float) -> None:
        """Take a picture that was there ``at_s`` seconds after the beginning.

        Raises:
            StorageError: if it cannot be written.
        """

    def __enter__(self) -> Output:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish."""


class Snapshot(Output):
    """The newest picture as a file, replaced as a whole each time."""

    def __init__(self, path: Path) -> None:
        check_picture_path(path)
        self._path = path

    def add(self, picture: Image.Image, at_s: float) -> None:
        """Replace the file."""
        save_picture(picture, self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the newest picture where it is."""


class Recording(Output):
    """A video in which each picture is shown from its time on, as somebody who watched the run saw them.

    It is written under another name and renamed when it is whole: at the end, and also after an interrupt or an error
    elsewhere. Without a single picture there is no file. All pictures get the size of the first.
    """

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError as error:
            raise DependencyError("recording needs PyAV", received=str(error), hint=install_hint("video")) from error
        if not path.absolute().parent.is_dir():
            raise ConfigError("the recording's folder does not exist", received=str(path), hint="make the folder first")
        self._path = path
        self._codec = next(name for name in _CODECS if name in av.codecs_available)
        self._file: AbstractContextManager[Path] | None = None
        self._container: Any = None
        self._stream: Any = None
        self._last: tuple[Image.Image, int] | None = None
        self._failed: BaseException | None = None

    def add(self, picture: Image.Image, at_s: float) -> None:
        """Append a picture."""
        try:
            with storage_errors(self._path):
                if self._container is None:
                    self._begin(picture.size)
                if picture.size != (self._stream.width, self._stream.height):
                    picture = ImageOps.pad(picture, (self._stream.width, self._stream.height))
                after_ms = -1 if self._last is None else self._last[1]
                self._encode(picture, max(round(at_s * 1000), after_ms + 1))
        except Exception as error:  # whatever it is, the file is broken; an interrupt costs a picture at most
            self._failed = error
            raise

    def _begin(self, size: tuple[int, int]) -> None:
        import av

        file = atomic_write(self._path)
        temporary = file.__enter__()
        self._file = file
        container = av.open(str(temporary), "w", format=_FORMATS[self._path.suffix.lower()])
        self._stream = container.add_stream(self._codec, rate=1000, options=_CODECS[self._codec])
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, 1000)
        self._container = container

    def _encode(self, picture: Image.Image, at_ms: int) -> None:
        import av

        shot = av.VideoFrame.from_image(picture)
        shot.pts, shot.time_base = at_ms, Fraction(1, 1000)
        self._container.mux(self._stream.encode(shot))
        self._last = picture, at_ms

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the end of the file and give it its name; remove it if it is the file itself that failed."""
        if self._file is None:
            return
        failed = self._failed
        try:
            if failed is None and self._last is not None:
                self._encode(self._last[0], self._last[1] + _LAST_MS)
                self._container.mux(self._stream.encode(None))
        except BaseException as at_end:
            failed = at_end
            raise
        finally:
            self._leave(failed)

    def _leave(self, failed: BaseException | None) -> None:
        """Close the file; give it its name if it is whole, or else remove it."""
        assert self._file is not None
        try:
            if self._container is not None:
                self._container.close()
        except Exception as at_close:  # FFmpeg writes the end of the file then
            failed = failed or at_close
        if failed is None and self._last is None:
            failed = StorageError("nothing was recorded")  # it removes the file, and is not raised
        if failed is None:
            self._file.__exit__(None, None, None)
        else:
            # Raises what the operating system refused as a StorageError, and nothing otherwise.
            self._file.__exit__(type(failed), failed, failed.__traceback__)


def output_to(path: Path, *, overwrite: bool = False) -> Output:
    """Return what ``path`` is by its suffix: a recording, or a picture of the newest answer.

    Raises:
        ConfigError: if it is neither, or its folder does not exist.
        StorageError: if nothing can be written there, or something stands there that is not to be replaced; not first
            at the end of a long run.
        DependencyError: if a recording needs what is not installed.
    """
    folder = path.absolute().parent
    if path.is_dir() or (folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK)):
        raise StorageError(
            "the output path cannot be written", received=path, expected="a file in a directory that you may write to"
        )
    suffix = path.suffix.lower()
    if suffix not in _FORMATS and suffix not in PICTURE_SUFFIXES:
        raise ConfigError(
            "neither a recording nor a picture by its name",
            received=path.name,
            expected=f"a name ending in {', '.join((*_FORMATS, *PICTURE_SUFFIXES))}",
        )
    if path.exists() and not overwrite:
        raise StorageError(
            "the output exists already",
            received=path,
            expected="a new file, or --overwrite",
            hint="it may be the source itself",
        )
    return Recording(path) if suffix in _FORMATS else Snapshot(path)
