"""The live page: the newest annotated frame and its answer, for any number of viewers.

A viewer that takes frames more slowly than they come misses some; nothing is queued for anybody.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from flashvlm_export.runtime.live.newest import Newest
from flashvlm_export.runtime.server.api_errors import LATER, ApiError, answer_errors
from flashvlm_export.runtime.server.guard import Guard
from flashvlm_export.runtime.server.listening import address_of, bound_socket, read_keys, server_of
from flashvlm_export.runtime.server.replies import event
from flashvlm_export.runtime.server.settings import ServerSettings

PAGE = Path(__file__).parent / "page"
_FILES = ("live.html", "page.css", "live.css", "live.js", "client.js", "element.js", "favicon.svg")
# Viewers at a time: each costs the bandwidth of a video.
MOST_VIEWERS = 16
# How often a viewer looks whether there is something new. A wait of its own would take a thread for each.
_LOOK_S = 0.02
_BOUNDARY = "frame"
_LONGEST_END_S = 3.0


@dataclass(frozen=True, eq=False)
class Shown:
    """What viewers get of one answered frame.

    Attributes:
        frame: a JPEG file, for the page, which says the rest itself.
        picture: a JPEG file with question, answer and figures below the frame, for players.
        told: what ``--json`` says of it, statistics included.
    """

    frame: bytes
    picture: bytes
    told: Mapping[str, Any]


def build_live_app(place: Newest[Shown], settings: ServerSettings, keys: list[str]) -> FastAPI:
    """Return the application.

    ``/`` and ``/live`` are the page, which needs no key and shows nothing without one; ``/live/events`` has answers,
    statistics and frames as server-sent events, and ``/live.mjpg`` pictures with the words below, as a network camera
    sends them.

    Args:
        place: where the newest is put; viewers are sent away when it is closed.
        settings: who may look, and from where.
        keys: one of which every request but for the page has to bring; empty lets everybody look.
    """
    app = FastAPI(title="flashvlm-export live", docs_url=None, redoc_url=None, openapi_url=None)
    viewers = 0

    async def newest() -> AsyncGenerator[Shown, None]:
        """Yield what is newest each time that a viewer has taken what there was before."""
        nonlocal viewers
        viewers += 1
        try:
            number = 0
            while True:
                while place.number == number and not place.closed:
                    await asyncio.sleep(_LOOK_S)
                found = place.wait(number, 0)
                if found is None:
                    return
                number, shown = found
                yield shown
        finally:
            viewers -= 1

    def stream(pieces: Callable[[Shown], bytes], end: bytes, media_type: str) -> Response:
        if viewers >= MOST_VIEWERS:
            message = f"{MOST_VIEWERS} viewers are watching already"
            raise ApiError(503, message, code="too_many_viewers", kind="server_error", headers=LATER)

        async def body() -> AsyncGenerator[bytes, None]:
            async for shown in newest():
                yield pieces(shown)
            yield end

        return StreamingResponse(body(), media_type=media_type)

    @app.get("/live/events")
    async def events() -> Response:
        def piece(shown: Shown) -> bytes:
            picture = "data:image/jpeg;base64," + base64.b64encode(shown.frame).decode()
            return event({**shown.told, "picture": picture})

        return stream(piece, event({"ended": True}), "text/event-stream")

    @app.get("/live.mjpg")
    async def pictures() -> Response:
        def piece(shown: Shown) -> bytes:
            head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(shown.picture)}\r\n\r\n"
            return head.encode() + shown.picture + b"\r\n"

        return stream(piece, f"--{_BOUNDARY}--\r\n".encode(), f"multipart/x-mixed-replace; boundary={_BOUNDARY}")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/")
    @app.get("/live")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "live.html")

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404)
        return FileResponse(PAGE / name)

    answer_errors(app)
    open_paths = ["/", "/live", "/health", *(f"/page/{name}" for name in _FILES)]
    app.add_middleware(Guard, settings=settings, keys=keys, open_paths=open_paths)
    return app


@contextmanager
def showing(place: Newest[Shown], settings: ServerSettings) -> Iterator[str]:
    """Serve the live page on a thread, at the address that is yielded; the end closes ``place``.

    Raises:
        ConfigError: if the address is taken, or the keys cannot be read.
    """
    keys = read_keys(settings)
    with bound_socket(settings.host, settings.port) as listener:
        ready = threading.Event()
        server = server_of(build_live_app(place, settings, keys), settings, ready.set)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                server.run(sockets=[listener])
            except BaseException as error:  # whatever it is, whoever waits for the page has to hear of it
                failed.append(error)

        thread = threading.Thread(target=run, name="flashvlm-live", daemon=True)
        thread.start()
        while not ready.wait(_LOOK_S) and thread.is_alive():
            pass
        if failed:
            raise failed[0]
        try:
            yield address_of(listener)
        finally:
            place.close()
            server.should_exit = True
            thread.join(_LONGEST_END_S)
            server.force_exit = True  # a viewer that takes nothing in does not hold up the end
            thread.join()
