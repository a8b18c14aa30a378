"""Cameras and network streams, read by FFmpeg through PyAV."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Generator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from flashvlm_export.errors import DependencyError, UsageError, VideoError, install_hint
from flashvlm_export.runtime.live.files import upright
from flashvlm_export.runtime.live.frame import Clock, Frame, Source

#: A stream that is silent for so long is given up, and opened again.
SILENCE_S = 10.0

# Protocols that an address may lead to. None of them reads files of this machine.
_PROTOCOLS = {"rtsp": "rtsp,rtp,udp,tcp", "http": "http,tcp", "https": "https,tls,tcp"}
# Formats of streams over HTTP, without playlists: those name further addresses.
_FORMATS = "mpjpeg,mjpeg,mpegts,matroska,webm,mov,mp4,flv,ogg,avi,h264,hevc"


class Stream(Source):
    """What FFmpeg reads as it comes: a camera of Video4Linux, or an address.

    Args:
        name: for people.
        address: as FFmpeg takes it.
        format: FFmpeg's name of it; ``None`` to find out.
        options: of FFmpeg's demuxer.
        hint: what to do if it cannot be opened.
        clock: see :data:`Clock`.
        silence_s: longest wait for a connection, and for the next packet.
    """

    reconnects = True

    def __init__(
        self,
        name: str,
        address: str,
        format: str | None,
        options: dict[str, str],
        hint: str,
        *,
        clock: Clock = time.monotonic,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.name = name
        self._address, self._format, self._options, self._hint = address, format, options, hint
        self._clock, self._silence_s = clock, silence_s

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """Yield frames as they come; see :meth:`Source.frames`. The end of a stream is one that broke off."""
        try:
            import av
        except ImportError as error:
            hint = install_hint("video")
            raise DependencyError("reading streams needs PyAV", received=str(error), hint=hint) from error
        opened, limits = False, (self._silence_s, self._silence_s)
        settings: dict[str, Any] = {"format": self._format, "options": self._options, "timeout": limits}
        try:
            with av.open(self._address, "r", metadata_errors="replace", **settings) as container:
                opened = True
                if not container.streams.video:
                    kinds = ", ".join(stream.type for stream in container.streams) or "no stream at all"
                    raise VideoError("the source has no video", received=f"{self.name}: {kinds}", hint=self._hint)
                stream = container.streams.video[0]
                # Frames in several threads come later by as many.
                stream.thread_type = "SLICE"
                for shot in container.decode(stream):
                    if stop.is_set():
                        return
                    if not shot.is_corrupt:  # a part of it was lost on the way: the next one is whole
                        yield Frame(self._clock(), partial(upright, shot))
        except av.FFmpegError as error:
            silent = isinstance(error, av.error.ExitError)
            reason = f"nothing came for {self._silence_s:g} s" if silent else error.strerror
            raise VideoError(
                "the source broke off" if opened else "the source cannot be opened",
                received=f"{self.name}: {reason}",
                expected="a camera or stream that delivers",
                hint=self._hint,
            ) from error
        raise VideoError("the stream ended", received=self.name, hint=self._hint)


def camera(device: str, *, size: tuple[int, int] | None = None, fps: float | None = None) -> Stream:
    """Return the camera at ``/dev/videoN``, in ``size`` (width, height) and at ``fps`` as far as it can."""
    options = {} if size is None else {"video_size": f"{size[0]}x{size[1]}"}
    options |= {} if fps is None else {"framerate": f"{fps:g}"}
    hint = "v4l2-ctl --list-devices lists cameras, v4l2-ctl -d DEVICE --list-formats-ext their sizes and rates"
    return Stream(device, device, "v4l2", options, hint)


def network(address: str) -> Stream:
    """Return the stream at an address.

    Raises:
        UsageError: if its protocol is none that is read.
    """
    try:
        parts = urlsplit(address)
        where = parts.hostname
    except ValueError:  # such as brackets that do not close
        raise UsageError(
            "this is no address", received=without_password(address), expected="rtsp://HOST/PATH"
        ) from None
    protocols = _PROTOCOLS.get(parts.scheme)
    if protocols is None or not where:
        expected = "rtsp://HOST/PATH, http://… or https://…"
        raise UsageError(
            "streams are not read from such an address", received=without_password(address), expected=expected
        )
    options = {"protocol_whitelist": protocols}
    if parts.scheme == "rtsp":
        # Over UDP, lost packets show as smeared frames.
        options |= {"rtsp_transport": "tcp", "allowed_media_types": "video"}
    else:
        options |= {"format_whitelist": _FORMATS}
    if parts.scheme == "https":
        # FFmpeg trusts everybody unless it is told not to. Without a file, its TLS library has the system's.
        authorities = ssl.get_default_verify_paths().cafile
        options |= {"tls_verify": "1"} | ({"ca_file": authorities} if authorities else {})
    hint = "is the address right, and is it reachable from here? ffprobe ADDRESS says what is there"
    if parts.scheme == "https":
        hint += "; SSL_CERT_FILE names a file of certificates to trust"
    if "@" in address and "@" not in parts.netloc:
        hint = "in a user or password, write / as %2F, ? as %3F and # as %23"
    return Stream(without_password(address), address, "rtsp" if parts.scheme == "rtsp" else None, options, hint)


def without_password(address: str) -> str:
    """Return ``address`` for people: with neither user and password nor what stands behind a question mark.

    Whoever forgets to write ``/``, ``?`` or ``#`` of a password as ``%2F``, ``%3F`` or ``%23`` shows nothing of it
    either: all before the last ``@`` is taken for one.
    """
    scheme, _, rest = address.partition("://")
    before, at, place = rest.rpartition("@")
    if at and "?" in before:  # of the password or of what is asked for: nobody knows, so that neither is shown
        return f"{scheme}://…"
    place, _, query = place.partition("#")[0].partition("?")
    return f"{scheme}://{place}" + ("?…" if query else "")
