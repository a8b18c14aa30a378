"""Pictures of strangers: what is fetched from where, and what is decoded."""

from __future__ import annotations

import gzip
import io
import ipaddress
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")

from helpers.serving import data_uri, png
from PIL import Image

from flashvlm_export.errors import ImageError
from flashvlm_export.runtime.server.pictures import PictureReader, is_public

LIMIT = 1 << 20


def encoded(kind: str, size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, kind)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of some kilobytes that is all zeros once decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * min((3 * width + 1) * height, 1 << 22))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Site(BaseHTTPRequestHandler):
    """Pictures, and what is sent in place of one."""

    seen: list[tuple[str, str]] = []  # noqa: RUF012  # the server makes a handler of its own for each request

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/secret")
            self.end_headers()
            return
        if self.path == "/slow-head":
            with suppress(OSError):  # nobody reads any more
                for _ in range(200):
                    self.wfile.write(b"H")
                    time.sleep(0.05)
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/endless":
            with suppress(OSError):  # nobody reads any more
                while True:
                    self.wfile.write(b"\0" * 65536)
            return
        if self.path == "/slow":
            with suppress(OSError):  # nobody reads any more
                for _ in range(200):
                    self.wfile.write(b"\0")
                    time.sleep(0.05)
            return
        self.wfile.write(png(1))

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def site() -> Iterator[int]:
    Site.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def reader(hosts: tuple[str, ...] = (), *, private: bool = False, seconds: float = 5.0) -> PictureReader:
    may_reach = (lambda address: True) if private else is_public
    return PictureReader(hosts, limit_pixels=10_000, limit_bytes=LIMIT, seconds=seconds, may_reach=may_reach)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_openais_formats_are_read(kind: str) -> None:
    assert reader().read(data_uri(encoded(kind), kind.lower())) == (encoded(kind), (8, 6))


def test_a_picture_that_comes_again_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = reader()
    first = pictures.read(data_uri(png(1)))
    pictures.read(data_uri(png(2)))
    monkeypatch.setattr("flashvlm_export.runtime.server.pictures.load_image", lambda *_, **__: pytest.fail("decoded"))
    assert pictures.read(data_uri(png(1))) == first == (png(1), (80, 60))
    with pytest.raises(pytest.fail.Exception):
        pictures.read(data_uri(png(3)))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO", "PDF", "EPS", "JPEG2000"])
def test_other_decoders_are_out_of_reach(kind: str) -> None:
    """Also behind the name of another format."""
    with pytest.raises(ImageError, match="not an image that can be read"):
        reader().read(data_uri(encoded(kind), "png"))


def test_size_is_that_of_the_upright_picture() -> None:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(stream, "JPEG", exif=exif)
    assert reader().read(data_uri(stream.getvalue(), "jpeg"))[1] == (6, 8)


@pytest.mark.parametrize(("width", "height"), [(101, 100), (10_001, 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_counted_before_any_is_decoded(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"too many pixels|cannot be read|can be read"):
        reader().read(data_uri(bomb(width, height)))


@pytest.mark.parametrize("content", [gzip.compress(png(1)), png(1)[:100], b"<svg/>", b"\x89PNG\r\n\x1a\n", bomb(0, 0)])
def test_what_is_no_whole_picture(content: bytes) -> None:
    with pytest.raises(ImageError):
        reader().read(data_uri(content))


def test_an_allowed_host_is_fetched_from(site: int) -> None:
    url = f"http://localhost:{site}/cat.png?size=1#part"
    assert reader(("localhost",), private=True).read(url) == (png(1), (80, 60))
    assert Site.seen == [("/cat.png?size=1", f"localhost:{site}")]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost.evil.example:{port}/",
        "http://localhost@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}@localhost/",
        "http://user:secret@localhost:{port}/",
        "http://evil.example\\@localhost:{port}/",
        "gopher://localhost:{port}/",
        "http:///cat.png",
        "http://localhost:99999/",
        "HTTP://127.0.0.1:{port}/",
    ],
)
def test_nothing_else_is(url: str, site: int) -> None:
    with pytest.raises(ImageError):
        reader(("localhost",), private=True).read(url.format(port=site))
    assert Site.seen == []


def test_an_allowed_name_of_a_private_address_is_not_connected_to(site: int) -> None:
    """Whoever owns the name could let it lead anywhere, and did, for what is on the list by mistake."""
    with pytest.raises(ImageError, match="public addresses only"):
        reader(("localhost",)).read(f"http://localhost:{site}/")
    assert Site.seen == []


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "::", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "ff02::1", "255.255.255.255"),
        *("64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::7f00:1", "fec0::1", "::ffff:8.8.8.8"),
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/redirect", "says 302"),
        ("/missing", "says 404"),
        ("/endless", f"more than {LIMIT} bytes"),
        ("/slow", "too long|timed out"),
        ("/slow-head", "cannot be fetched"),
    ],
)
def test_sites_that_do_not_behave(path: str, message: str, site: int) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=message):
        reader(("localhost",), private=True, seconds=0.5).read(f"http://localhost:{site}{path}")
    assert time.monotonic() - start < 8, "a slow site goes on for ten seconds"
    assert [seen for seen, _ in Site.seen] == [path], "nobody went where the redirect leads"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_address_that_is_silent_leaves_time_for_the_next(
    scheme: str, site: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one answers, or begins to, but never ends: the time for all of it is kept."""
    look_up = socket.getaddrinfo

    def both(host: str, *given: Any, **more: Any) -> Any:
        return [*look_up("127.0.0.2", *given, **more), *look_up("127.0.0.1", *given, **more)]

    with ExitStack() as stack:
        # Who has connected to a backlog of nothing is not accepted: the next is not answered at all.
        silent = stack.enter_context(socket.create_server(("127.0.0.2", site), backlog=0))
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        monkeypatch.setattr("socket.getaddrinfo", both)
        start = time.monotonic()
        if scheme == "http":
            assert reader(("localhost",), private=True, seconds=2).read(f"http://localhost:{site}/")[1] == (80, 60)
        else:  # the site takes the greeting for a request that goes on
            with pytest.raises(ImageError, match="cannot be fetched"):
                reader(("localhost",), private=True, seconds=2).read(f"https://localhost:{site}/")
        assert 0.9 < time.monotonic() - start < 8


def test_a_greeting_that_does_not_end_is_cut_off() -> None:
    """Each byte comes in time, as that of a record of TLS; all of them do not."""

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # nobody reads any more
            connection.sendall(b"\x16\x03\x03\x40\x00")
            for _ in range(200):
                connection.sendall(b"\x02")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=[listener])
        thread.start()
        start = time.monotonic()
        with pytest.raises(ImageError, match="cannot be fetched"):
            reader(("localhost",), private=True, seconds=0.5).read(f"https://localhost:{listener.getsockname()[1]}/")
        assert time.monotonic() - start < 8, "it goes on for ten seconds"
        thread.join()


def test_only_so_many_sizes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvlm_export.runtime.server.pictures._MOST_KNOWN", 2)
    pictures = reader()
    for seed in (1, 2, 3):
        pictures.read(data_uri(png(seed)))
    monkeypatch.setattr("flashvlm_export.runtime.server.pictures.load_image", lambda *_, **__: pytest.fail("decoded"))
    for seed in (2, 3):
        pictures.read(data_uri(png(seed)))
    with pytest.raises(pytest.fail.Exception):
        pictures.read(data_uri(png(1)))


def addresses(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[tuple[str, int]]:
    """Let names lead to these addresses, one list for each look-up; return where connections go, which all fail."""
    looked_up, connected = iter(answers), []

    def connect(where: tuple[str, int], timeout: float) -> None:
        connected.append(where)
        raise OSError("no route to host")

    monkeypatch.setattr(
        "socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443)) for address in next(looked_up)]
    )
    monkeypatch.setattr("socket.create_connection", connect)
    return connected


def test_what_was_looked_at_is_what_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that leads elsewhere the second time it is asked for (DNS rebinding) leads nowhere."""
    connected = addresses(monkeypatch, ["2606:2800:220:1::1", "93.184.216.34"], ["127.0.0.1"])
    with pytest.raises(ImageError, match="no route"):
        reader(("example.com",)).read("https://example.com/cat.png")
    assert connected == [("2606:2800:220:1::1", 443), ("93.184.216.34", 443)], "one of them may be out of reach"


@pytest.mark.parametrize("found", [["93.184.216.34", "10.0.0.1"], ["10.0.0.1", "93.184.216.34"]])
def test_every_address_of_a_name_has_to_be_public(found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    connected = addresses(monkeypatch, found)
    with pytest.raises(ImageError, match="public addresses only"):
        reader(("example.com",)).read("https://example.com/cat.png")
    assert connected == []


def test_characters_that_no_address_has(site: int) -> None:
    with pytest.raises(ImageError, match="cannot be fetched"):
        reader(("localhost",), private=True).read(f"http://localhost:{site}/é.png")


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scan of a progressive JPEG costs as much as the whole picture, and takes a few bytes."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    assert reader().read(data_uri(content, "jpeg"))[1] == (64, 48)
    scan = content[content.rindex(b"\xff\xda") : -2]
    monkeypatch.setattr("flashvlm_export.runtime.server.pictures.load_image", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="too many scans"):
        reader().read(data_uri(content[:-2] + scan * 100 + content[-2:], "jpeg"))


def test_nobody_at_home(site: int) -> None:
    with pytest.raises(ImageError, match="cannot be fetched"):
        reader(("localhost",), private=True).read("http://localhost:1/cat.png")
