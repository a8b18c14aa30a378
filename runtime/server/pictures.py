"""From ``image_url`` to the bytes of a picture that is safe to decode.

A picture comes inside the request, as a data URI. Hosts on the list may be fetched from, at public addresses only and
without a redirect: a client must not be able to send this machine to its own network (server-side request forgery).
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from flashvlm_export.errors import ImageError
from flashvlm_export.runtime.images import data_url_bytes, load_image

#: What OpenAI's API takes; Pillow reads many more formats, each of which is a decoder that strangers could feed.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")

_PIECE = 1 << 16
_MOST_KNOWN = 4096
# Of a progressive JPEG, each of which costs as much as decoding the whole picture; libjpeg advises to have a limit.
_MOST_SCANS = 100
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
# Unicast addresses of IPv6, but for those of 6to4, which lead to any address of IPv4.
_UNICAST, _6TO4 = ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("2002::/16")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether ``address`` is one of the internet's, and no machine of ours."""
    if isinstance(address, ipaddress.IPv6Address) and (address not in _UNICAST or address in _6TO4):
        return False
    return address.is_global and not address.is_multicast


class PictureReader:
    """Reads pictures; blocking, for a thread of its own.

    Args:
        hosts: that may be fetched from, exact names.
        limit_pixels: width x height, looked at before anything is decoded.
        limit_bytes: of a file that is fetched.
        seconds: for all of a fetch.
        may_reach: whether an address may be connected to.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        limit_pixels: int,
        limit_bytes: int,
        seconds: float,
        may_reach: Callable[[Address], bool] = is_public,
    ) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self.limit_pixels, self.limit_bytes, self.seconds = limit_pixels, limit_bytes, seconds
        self._may_reach = may_reach
        self._known: dict[bytes, tuple[int, int]] = {}
        self._changing = threading.Lock()

    def read(self, url: str) -> tuple[bytes, tuple[int, int]]:
        """Return the encoded picture at ``url``, which was decoded once to know that it can be, and its upright size.

        Raises:
            ImageError: if it is not to be read, or not a whole picture of an allowed format and size.
        """
        content = data_url_bytes(url) if url.startswith("data:") else self._fetch(url)
        return content, self._size(hashlib.sha256(content).digest(), content)

    def _size(self, digest: bytes, content: bytes) -> tuple[int, int]:
        """Return the size of a picture that was decoded, now or when it came before: conversations send it again."""
        size = self._known.get(digest)
        if size is None:
            if content.startswith(_JPEG) and content.count(_SCAN) > _MOST_SCANS:
                raise ImageError(
                    "the picture has too many scans", received=content.count(_SCAN), expected=f"at most {_MOST_SCANS}"
                )
            size = load_image(content, limit_pixels=self.limit_pixels, formats=FORMATS).size
            with self._changing:
                if len(self._known) >= _MOST_KNOWN:
                    del self._known[next(iter(self._known))]  # the oldest
                self._known[digest] = size
        return size

    def _fetch(self, url: str) -> bytes:
        shown = url[:200]
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ImageError("this is not the address of a picture", received=f"{shown}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageError(
                "a picture comes inside the request",
                received=f"{shown[:40]}...",
                expected="data:image/png;base64,... or another type of image",
            )
        if parts.hostname not in self.hosts or parts.username is not None:
            raise ImageError(
                "pictures are not fetched from this host",
                received=shown,
                expected="a picture inside the request, as data:image/png;base64,..."
                + (f", or from {', '.join(sorted(self.hosts))}" if self.hosts else ""),
            )
        port = port or (443 if parts.scheme == "https" else 80)
        deadline = time.monotonic() + self.seconds
        try:
            return self._get(parts, port, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: characters that no URL has
            raise ImageError(
                "the picture cannot be fetched", received=f"{shown}: {error or type(error).__name__}"
            ) from None

    def _get(self, parts: SplitResult, port: int, deadline: float) -> bytes:
        assert parts.hostname is not None  # it is on the list
        # Connected to the very address that was looked at: a second look-up could have another result.
        connection = _Pinned(
            parts.hostname, port, self._addresses(parts.hostname, port), parts.scheme == "https", deadline
        )
        # A site that sends a byte now and then would hold up every read for as long as it likes.
        watchdog = threading.Timer(_left(deadline), connection.cut_off)
        watchdog.start()
        try:
            target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
            connection.request("GET", target, headers={"Accept": "image/*"})
            response = connection.getresponse()
            if response.status != 200:
                raise ImageError(
                    "the picture cannot be fetched",
                    received=f"{parts.hostname} says {response.status}",
                    expected="200; a redirect is not followed",
                )
            content = bytearray()
            while len(content) <= self.limit_bytes:
                piece = response.read1(_PIECE)
                if not piece:
                    _left(deadline)  # cut off, it ends as a whole one does
                    return bytes(content)
                content += piece
            raise ImageError(
                "the picture is too large", received=f"more than {self.limit_bytes} bytes from {parts.hostname}"
            )
        finally:
            watchdog.cancel()
            connection.close()

    def _addresses(self, host: str, port: int) -> list[str]:
        found = dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        for address in found:
            if not self._may_reach(ipaddress.ip_address(address.partition("%")[0])):
                raise ImageError(
                    "pictures are fetched from public addresses only", received=f"{host} is at a private one"
                )
        return list(found)


class _Pinned(http.client.HTTPConnection):
    """A connection to ``host`` at one of its ``addresses``, which are already known."""

    def __init__(self, host: str, port: int, addresses: Sequence[str], encrypted: bool, deadline: float) -> None:
        super().__init__(host, port)
        self._addresses, self._encrypted, self._deadline = addresses, encrypted, deadline
        self._open: socket.socket | None = None

    def connect(self) -> None:
        for untried, address in zip(range(len(self._addresses), 0, -1), self._addresses, strict=True):
            try:
                # One that does not answer leaves time for the next, which may be reachable, such as by IPv4.
                self.sock = socket.create_connection((address, self.port), _left(self._deadline) / untried)
                break
            except OSError:
                if untried == 1:
                    raise
        self.sock.settimeout(_left(self._deadline))
        if self._encrypted:  # for all of whose greeting that is the time
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        self._open = self.sock  # from here on it can be cut off,
        _left(self._deadline)  # unless that was to be before

    def cut_off(self) -> None:
        """End whatever is being read, from another thread."""
        if self._open is not None:
            with suppress(OSError):  # it has ended by itself
                self._open.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it takes too long")
    return left
