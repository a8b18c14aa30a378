"""Two hundred requests that mean no good, at ``flashvlm serve``: what became of each, and of the others.

Regime: none; it is no matter of time. Each kind comes several times, all kinds in a shuffled order, from several
connections at once, while one good client asks on and compares its answers. The outcome of a request is the status and
code of its response, or how the connection ended.

Exit code 1 if an outcome is not among those of its kind, an answer to the good client is another than before, an error
holds a traceback, or the server's memory has grown by more than 64 MiB, the size of a few pictures under way.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from http_load import MIB, server
from output import finish
from PIL import Image

from flashvlm_export.bundle import Bundle

SLOW_SECONDS = 2.0
CLOSED = "closed"


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a small picture."""
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, kind)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG that is small until it is decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 22)))
        + chunk(b"IEND", b"")
    )


def scans(count: int) -> bytes:
    """Return a progressive JPEG with so many scans more than it needs."""
    stream = io.BytesIO()
    Image.new("L", (4000, 4000)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + content[-2:]


def body(model: str, *urls: str, text: str = "What is it?", **more: Any) -> bytes:
    """Return a request about the pictures at ``urls``."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": text}]
    return json.dumps(
        {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}
    ).encode()


def uri(content: bytes) -> str:
    """Return ``content`` as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def head(length: int | str, *lines: str, kind: str = "application/json", host: str = "localhost") -> bytes:
    """Return the head of a request."""
    first = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", f"Content-Type: {kind}", "Connection: close"]
    return "\r\n".join([*first, *lines, f"Content-Length: {length}", "", ""]).encode()


def post(content: bytes, **options: str) -> bytes:
    """Return a whole request."""
    return head(len(content), **options) + content


def chunked(pieces: int) -> bytes:
    """Return a request of unknown length."""
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return start + (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * pieces + b"0\r\n\r\n"


@dataclass(frozen=True)
class Kind:
    """One way to be hostile.

    Attributes:
        sent: what is sent.
        outcomes: those that are right.
        manner: ``send`` and read; ``drip`` all of it, or ``drip body``, byte by byte; ``half`` closed behind it;
            ``leave`` in the middle of the answer; ``deaf``: never read.
    """

    name: str
    sent: bytes
    outcomes: tuple[str, ...]
    manner: str = "send"


def kinds(model: str, visual_tokens: int) -> list[Kind]:
    """Return all of them."""
    good = uri(picture())
    bad_image = ("400 invalid_image",)
    invalid = ("400 invalid_value",)
    stream = body(model, good, stream=True)
    nested = b'{"model": ' + b"[" * 100_000
    return [
        Kind("JSON that breaks off", post(b'{"model": '), ("400 json_invalid",)),
        Kind("JSON nested 100,000 deep", post(nested), ("400 json_invalid", "400 None")),
        Kind("no JSON: bytes", post(b"\xff\xfe\x00" * 99), ("400 json_invalid", "400 None")),
        Kind("another type: a list", post(b"[]"), ("400 model_attributes_type", "400 model_type")),
        Kind("unknown field", post(body(model, good, root=True)), ("400 unsupported_parameter",)),
        Kind(
            "NaN as temperature",
            post(body(model, good).replace(b'"max_tokens": 8', b'"temperature": NaN')),
            ("400 less_than_equal", "400 greater_than_equal", "400 finite_number", *invalid),
        ),
        Kind(
            "a number of 5,000 digits",
            post(body(model, good).replace(b": 8", b": " + b"9" * 5000)),
            ("400 json_invalid", "400 None"),
        ),
        Kind("a stop text of 1 MB", post(body(model, good, stop="x" * 1_000_000)), ("400 string_too_long",)),
        Kind("100,000 messages of nothing", post(body(model, good, messages=[{}] * 100_000)), ("400 too_long",)),
        Kind(
            "metadata of 100,000 keys",
            post(body(model, good, metadata=dict.fromkeys(map(str, range(100_000)), ""))),
            ("400 too_long",),
        ),
        Kind("JPEG of 1,000 scans", post(body(model, uri(scans(1000)))), bad_image),
        Kind(
            "another content type",
            post(body(model, good), kind="text/plain"),
            ("400 model_attributes_type", "400 model_type"),
        ),
        Kind(
            "malformed multipart",
            post(b"--x\r\nbroken", kind="multipart/form-data; boundary=x"),
            ("400 model_attributes_type", "400 model_type"),
        ),
        Kind("a body declared as 1 TB", head(1 << 40), ("413 request_too_large",)),
        Kind("40 MB in chunks", chunked(40), ("413 request_too_large",)),
        Kind("two lengths", head(5, "Content-Length: 6") + b"hello!", ("400 Invalid HTTP request received.",)),
        Kind(
            "length and chunks (smuggling)",
            head(4, "Transfer-Encoding: chunked") + b"0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n",
            ("400 missing", "400 Invalid HTTP request received."),
        ),
        Kind(
            "head of 1 MB", b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 20), ("400 Invalid HTTP request received.", CLOSED)
        ),
        Kind(
            "no HTTP: a TLS hello",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
            ("400 Invalid HTTP request received.",),
        ),
        Kind("another host's name", post(body(model, good), host="evil.example"), ("421 wrong_host",)),
        Kind(
            "out of the page's folder",
            b"GET /page/..%2f..%2fapp.py HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            ("404 None",),
        ),
        Kind("PNG of 3.6 gigapixels", post(body(model, uri(bomb(60_000, 60_000)))), bad_image),
        Kind("PNG of 25 megapixels", post(body(model, uri(bomb(5_000, 5_001)))), bad_image),
        Kind("picture cut off", post(body(model, uri(picture()[:-30]))), bad_image),
        Kind("picture of random bytes", post(body(model, uri(random.Random(1).randbytes(5000)))), bad_image),
        Kind("EPS, which is a program", post(body(model, uri(picture("EPS")))), bad_image),
        Kind("TIFF", post(body(model, uri(picture("TIFF")))), bad_image),
        Kind("file URL", post(body(model, "file:///etc/passwd")), bad_image),
        Kind("cloud metadata (SSRF)", post(body(model, "http://169.254.169.254/latest/meta-data/")), bad_image),
        Kind("loopback (SSRF)", post(body(model, "http://localhost:8000/metrics")), bad_image),
        Kind("17 pictures", post(body(model, *[good] * 17)), ("400 too_many_images",)),
        Kind("prompt of 1 MB", post(body(model, good, text="why " * 250_000)), ("400 context_length_exceeded",)),
        Kind("placeholders in the text", post(body(model, good, text="<image>" * 50)), invalid),
        Kind("budget beyond the image", post(body(model, good, token_budget=visual_tokens + 1)), invalid),
        Kind("a million tokens of answer", post(body(model, good, max_tokens=1_000_000)), invalid),
        Kind("head byte by byte", head(10, *["X: 1"] * 50), (CLOSED,), "drip"),
        Kind("body byte by byte", post(body(model, good)), ("408 request_timeout",), "drip body"),
        Kind("half-closed behind the request", post(stream), (CLOSED, "200"), "half"),
        Kind("gone in the middle of the answer", post(stream), ("left",), "leave"),
        Kind("never reads", post(stream), ("left",), "deaf"),
    ]


def outcome(answer: bytes) -> str:
    """Return status and code of a response."""
    if not answer:
        return CLOSED
    start, _, content = answer.partition(b"\r\n\r\n")
    status = start.split()[1].decode()
    if status == "200":
        return status
    try:
        return f"{status} {json.loads(content)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"{status} {content.decode(errors='replace').strip()[:60]}"


def play(url: str, kind: Kind) -> tuple[Kind, str, bytes]:
    """Be hostile once; return what came of it."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 60) as connection:
        answer = b""
        try:
            if kind.manner.startswith("drip"):
                start = kind.sent.index(b"\r\n\r\n") + 4 if kind.manner == "drip body" else 0
                connection.sendall(kind.sent[:start])
                for number in range(start, len(kind.sent)):
                    connection.sendall(kind.sent[number : number + 1])
                    time.sleep(0.02)
            else:
                connection.sendall(kind.sent)
            if kind.manner == "half":
                connection.shutdown(socket.SHUT_WR)
            if kind.manner == "leave":
                connection.recv(64)
                return kind, "left", b""
            if kind.manner == "deaf":
                time.sleep(1)
                return kind, "left", b""
        except OSError:  # it was thrown out before it had sent all; an answer may be there
            pass
        try:
            while piece := connection.recv(1 << 16):
                answer += piece
        except OSError:  # reset
            pass
        return kind, outcome(answer), answer


def keep_asking(url: str, content: bytes, expected: str, stop: threading.Event, answers: Counter[str]) -> None:
    """Be a good client until told to stop; count right and other answers."""
    session = requests.Session()
    while not stop.is_set():
        response = session.post(
            f"{url}/v1/chat/completions", content, headers={"Content-Type": "application/json"}, timeout=60
        )
        right = response.ok and response.json()["choices"][0]["message"]["content"] == expected
        answers["right" if right else f"{response.status_code} {response.text[:200]}"] += 1


def busy(url: str) -> int:
    """Return how many requests are still being worked on, once the good ones have ended and a while has passed."""
    for _ in range(100):
        lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
        counts = [line.split() for line in lines if line.startswith(("flashvlm_queue_req", "flashvlm_running_req"))]
        if not (count := sum(int(float(value)) for _, value in counts)):
            return 0
        time.sleep(0.1)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--times", type=int, default=6, help="of each kind")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    tokens = Bundle.open(args.bundle).manifest.dims.num_patches
    with server(args.bundle, 8, "--slow-seconds", str(SLOW_SECONDS)) as (url, process):
        model = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        content = body(model, uri(picture()))
        response = requests.post(
            f"{url}/v1/chat/completions", content, headers={"Content-Type": "application/json"}, timeout=60
        )
        expected = response.json()["choices"][0]["message"]["content"]
        everything = [kind for kind in kinds(model, tokens) for _ in range(args.times)]
        random.Random(0).shuffle(everything)
        with ThreadPoolExecutor(4) as clients:  # warm: pages that Python and Pillow take once
            list(clients.map(lambda kind: play(url, kind), kinds(model, tokens)))
        before = process.memory_info().rss / MIB
        stop, answers = threading.Event(), Counter[str]()
        good = threading.Thread(target=keep_asking, args=(url, content, expected, stop, answers))
        good.start()
        with ThreadPoolExecutor(8) as clients:
            played = list(clients.map(lambda kind: play(url, kind), everything))
        stop.set()
        good.join()
        left = busy(url)
        grown = process.memory_info().rss / MIB - before
        open_files = process.num_fds()
    wrong = 0
    table = []
    for kind in kinds(model, tokens):
        mine = [(found, answer) for one, found, answer in played if one.name == kind.name]
        found = Counter(name for name, _ in mine)
        bad = sum(count for name, count in found.items() if name not in kind.outcomes)
        bad += sum(b"Traceback" in answer for _, answer in mine)
        wrong += bad
        shown = ", ".join(f"{count} x {name}" for name, count in found.items())
        table.append({"kind": kind.name, "requests": len(mine), "outcomes": dict(found), "wrong": bad})
        print(f"{kind.name:36}{shown}{'   WRONG' if bad else ''}", file=sys.stderr)
    print(f"{len(played)} hostile requests, {wrong} wrong; beside them {dict(answers)}", file=sys.stderr)
    finish(
        {
            "benchmark": "hostile_requests",
            "requests": len(played),
            "wrong": wrong,
            "good_client": dict(answers),
            "memory_grown_mib": round(grown, 1),
            "open_files": open_files,
            "still_worked_on": left,
            "kinds": table,
        },
        args.output,
    )
    return 1 if wrong or left or set(answers) != {"right"} or grown > 64 else 0


if __name__ == "__main__":
    sys.exit(main())
