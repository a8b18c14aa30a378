"""The page's server with answers that a test writes: it can wait between two chunks, and break off."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "runtime" / "server" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MODEL = {
    "visual_tokens": 16,
    "default_budget": 5,
    "selectors": [],
    "max_images": 16,
    "max_image_pixels": 10**7,
    "max_body_bytes": 10**7,
}

#: From the body of a question to the events of its answer, or to what refuses it.
Script = Callable[[dict[str, Any]], Iterable[dict[str, Any]]]


class Refusal(Exception):
    """What a script raises to refuse a question before its answer begins."""

    def __init__(self, status: int, message: str, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


class ScriptedServer(ThreadingHTTPServer):
    """Listens at a free loopback port.

    Attributes:
        script: of the next question.
        left: is set once a client has gone before its answer was complete.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base = f"http://127.0.0.1:{self.server_address[1]}"
        self.script: Script = answer
        self.left = threading.Event()


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Serve until the block ends."""
    with ScriptedServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def selection(
    kept: list[int], grids: Iterable[tuple[int, int]] = ((4, 4),), view: Iterable[float] = (0, 0, 1, 1)
) -> dict:
    """The first chunk."""
    image = {"grids": list(grids), "kept_indices": kept, "view": list(view)}
    return _chunk({"role": "assistant", "content": ""}, None, {"images": [image]})


def words(text: str) -> dict[str, Any]:
    """A chunk of text."""
    return _chunk({"content": text}, None)


def ending(**stage_ms: float) -> dict[str, Any]:
    """The chunk that ends an answer."""
    return _chunk({}, "stop", {"stage_ms": stage_ms})


def answer(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A whole answer, which keeps the first tokens."""
    budget = body["token_budget"]
    yield selection(list(range(16 if budget == "full" else budget)))
    yield words("a cat")
    yield ending(encode=20.0, select=1.0, prefill=5.0, decode=10.0)


def _chunk(delta: dict[str, str], reason: str | None, ours: dict[str, Any] | None = None) -> dict[str, Any]:
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return chunk if ours is None else {**chunk, "flashvlm": ours}


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            card = {"id": "scripted", "object": "model", "created": 0, "owned_by": "flashvlm-export", "flashvlm": MODEL}
            self._send(200, "application/json", json.dumps({"object": "list", "data": [card]}).encode())
            return
        file = PAGE / (self.path.removeprefix("/page/") if self.path != "/" else "index.html")
        self._send(200, TYPES[file.suffix], file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            events = iter(self.server.script(body))
            first = next(events)  # what refuses comes before
        except Refusal as refusal:
            self._send(refusal.status, "application/json", json.dumps(refusal.body).encode(), refusal.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in itertools.chain([first], events):
                self._event(json.dumps(event))
            self._event("[DONE]")
        except OSError:
            self.server.left.set()

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, kind: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(HTTPStatus(status))
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""
