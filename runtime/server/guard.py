"""What every request passes before a route sees it: its host, its key, its size, and the time it takes to arrive.

Written against ASGI itself, so that a body is counted as it comes.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashvlm_export.runtime.server.api_errors import ApiError
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


class Guard:
    """Lets through to ``app`` what may come.

    Args:
        app: behind it.
        settings: limits and names.
        keys: one of which a request has to bring; empty lets everybody in.
        open_paths: that need no key.
        on_refused: hears the status of each error.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        keys: Sequence[str],
        open_paths: Collection[str],
        on_refused: Callable[[str], object] = lambda status: None,
    ) -> None:
        self._app, self._keys, self._on_refused = app, [key.encode() for key in keys], on_refused
        self._open_paths = frozenset(open_paths)
        self._limit_bytes, self._seconds = settings.max_body_mib << 20, settings.slow_seconds
        self._names = frozenset(settings.hosts or (LOOPBACK_NAMES if settings.on_loopback else ()))

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

        try:
            self._check_host(headers)
            self._check_key(scope, headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            self._on_refused(str(error.status))
            response = JSONResponse(error.body, error.status, error.headers)
            await response(scope, receive, with_headers)
            return
        if body is None:  # the client has gone
            return
        await self._app(scope, _with_body(body, receive), with_headers)

    def _check_host(self, headers: Headers) -> None:
        """Refuse other names: a page elsewhere, whose own name leads here, is not to speak to this machine."""
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._names and name.lower() not in self._names:
            raise ApiError(421, f"this server is not called {name[:80]!r}", code="wrong_host")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys or scope["path"] in self._open_paths:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Each of them is compared, and none of them faster than another.
        known = [hmac.compare_digest(key.strip().encode(), each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "this server needs an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body, ``None`` if the client went away before it was there.

        What is too large is read to its end, and dropped: a client hears of an error only once it has sent all.
        """
        length = headers.get("content-length", "0")
        too_large = length.isdecimal() and int(length) > self._limit_bytes
        large = ApiError(
            413, f"a request has at most {self._limit_bytes} bytes here", code="request_too_large", headers=_CLOSE
        )
        if too_large and "expect" in headers:  # it asks first
            raise large

        async def read() -> bytes | None:
            nonlocal too_large
            body, more = bytearray(), True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if too_large := too_large or len(body) > self._limit_bytes:
                    body.clear()
            return bytes(body)

        try:
            body = await asyncio.wait_for(read(), self._seconds)
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {self._seconds:g} s"
            raise large if too_large else ApiError(408, message, code="request_timeout", headers=_CLOSE) from None
        if too_large and body is not None:
            raise large
        return body


_CLOSE = {"Connection": "close"}


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
