"""What every request passes before a route sees it: its host, its key, its size, and the time it takes to arrive.

Written against ASGI itself, so that a body is counted as it comes.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection, Sequence

from anyio import move_on_after
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashvlm_export.runtime.server.api_errors import LATER, ApiError, route_of
from flashvlm_export.runtime.server.settings import ServerSettings

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

# Of an error that comes before the whole request: what is left of it would follow on the same connection.
_CLOSE = {"Connection": "close"}
# Bodies of requests under way at a time, of the largest size.
_MOST_HELD = 16


class Guard:
    """Lets through to ``app`` what may come.

    Args:
        app: behind it.
        settings: limits and names.
        keys: one of which a request has to bring; empty lets everybody in.
        open_paths: that need no key.
        on_refused: hears route and status of each error.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        keys: Sequence[str],
        open_paths: Collection[str],
        on_refused: Callable[[str, int], object] = lambda route, status: None,
    ) -> None:
        self._app, self._keys, self._on_refused = app, [key.encode() for key in keys], on_refused
        self._open_paths = frozenset(open_paths)
        self._limit_bytes, self._seconds = settings.max_body_mib << 20, settings.slow_seconds
        self._held_bytes = 0
        names = settings.hosts or ((*LOOPBACK_NAMES, settings.host) if settings.on_loopback else ())
        self._names = frozenset(map(_in_a_header, names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        held: list[int] = []
        try:
            self._check_host(headers)
            self._check_key(scope, headers)
            body = await self._body(headers, receive, held)
            if body is not None:  # else the client has gone
                await self._app(scope, _with_body(body, receive), with_headers)
        except ApiError as error:
            self._on_refused(route_of(scope), error.status)
            response = JSONResponse(error.body, error.status, error.headers)
            await response(scope, receive, with_headers)
        finally:
            self._held_bytes -= sum(held)

    def _check_host(self, headers: Headers) -> None:
        """Refuse other names: a page elsewhere, whose own name leads here, is not to speak to this machine."""
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._names and name.lower() not in self._names:
            raise ApiError(421, f"this server is not called {name[:80]!r}", code="wrong_host", headers=_CLOSE)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys or route_of(scope) in self._open_paths:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Each of them is compared, and none of them faster than another.
        known = [hmac.compare_digest(key.strip().encode(), each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "this server needs an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", **_CLOSE},
            )

    async def _body(self, headers: Headers, receive: Receive, held: list[int]) -> bytes | None:
        """Return the whole body, ``None`` if the client went away before it was there.

        What is too much is read to its end, and dropped: a client hears of an error only once it has sent all.
        """
        length = headers.get("content-length", "0")
        too_large = length.isdecimal() and int(length) > self._limit_bytes
        large = ApiError(
            413, f"a request has at most {self._limit_bytes} bytes here", code="request_too_large", headers=_CLOSE
        )
        if too_large and "expect" in headers:  # it asks first
            raise large

        body, more, full = bytearray(), True, False
        with move_on_after(self._seconds) as scope:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                piece, more = message.get("body", b""), message.get("more_body", False)
                too_large = too_large or len(body) + len(piece) > self._limit_bytes
                full = full or self._held_bytes + len(piece) > _MOST_HELD * self._limit_bytes
                if too_large or full:
                    body.clear()  # as many as may come at once would wait with it for their ends
                else:
                    body += piece
                    held.append(len(piece))
                    self._held_bytes += len(piece)
        if too_large:
            raise large
        if scope.cancelled_caught:
            late = f"the request did not arrive within {self._seconds:g} s"
            raise ApiError(408, late, code="request_timeout", headers=_CLOSE)
        if full:
            busy = "too many requests are arriving"
            raise ApiError(503, busy, code="overloaded", kind="server_error", headers=LATER)
        return bytes(body)


def _in_a_header(name: str) -> str:
    """Return a host's name, or its address, as ``Host`` has it, in lower case."""
    return f"[{name.lower()}]" if ":" in name and not name.startswith("[") else name.lower()


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that hands out ``body`` and then waits for the client to go."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
