"""Servers for tests: the command in a process of its own, or an application on a thread with any answerer behind it."""

from __future__ import annotations

import base64
import io
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashvlm_export.runtime.server.answering import Answerer, ServiceAnswerer
from flashvlm_export.runtime.server.app import build_app
from flashvlm_export.runtime.server.listening import bound_socket, describe, opened, server_of
from flashvlm_export.runtime.server.settings import ServerSettings

WAIT_S = 60.0


def png(seed: int, size: tuple[int, int] = (80, 60)) -> bytes:
    """Noise of ``size`` (width, height) as a PNG file."""
    width, height = size
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    """A user's message as OpenAI's clients write it."""
    parts = [{"type": "image_url", "image_url": {"url": data_uri(each)}} for each in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@dataclass
class Process:
    """``flashvlm serve`` in a process of its own; ``lines`` are what it has printed."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Process]:
    """Start ``flashvlm serve`` at a free port, and stop it at the end, if a test has not."""
    command = [sys.executable, "-m", "flashvlm_export", "serve", str(bundle), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        served, ready = Process(process), threading.Event()

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                served.lines.append(line)
                if found := re.match(r"listening at (\S+),", line):
                    served.url = found.group(1)
                    ready.set()
            ready.set()

        reader = threading.Thread(target=listen)
        reader.start()
        try:
            assert ready.wait(WAIT_S)
            assert served.url, "".join(served.lines)
            yield served
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(WAIT_S)
            reader.join(WAIT_S)


@contextmanager
def app_of(
    bundle: Path, answerer: Answerer | None = None, keys: tuple[str, ...] = (), **settings: Any
) -> Iterator[tuple[str, Any]]:
    """Serve a bundle on a thread; yield the address and the service, which another answerer may stand in for."""
    chosen = ServerSettings(bundle=bundle, port=0, threads=1, **settings)
    with bound_socket(chosen.host, 0) as listener, opened(chosen) as (vlm, service):
        app = build_app(describe(vlm, chosen), answerer or ServiceAnswerer(service), chosen, keys)
        ready = threading.Event()
        server = server_of(app, chosen, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        port = listener.getsockname()[1]
        thread.start()
        try:
            assert ready.wait(WAIT_S)
            yield f"http://{chosen.host}:{port}", service
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()


def raw_connection(url: str) -> socket.socket:
    """A connection to a server, for clients that do not behave."""
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), WAIT_S)


def read_to_end(connection: socket.socket) -> bytes:
    """What a server sends until it closes the connection."""
    content = b""
    while piece := connection.recv(1 << 16):
        content += piece
    return content
