"""From settings to a server; SIGINT and SIGTERM let what runs finish, and refuse what is new."""

from __future__ import annotations

import asyncio
import copy
import errno
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import ConfigError
from flashvlm_export.ort import PROVIDERS
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.server.answering import ServiceAnswerer
from flashvlm_export.runtime.server.app import build_app
from flashvlm_export.runtime.server.conversation import Model
from flashvlm_export.runtime.server.settings import ServerSettings
from flashvlm_export.runtime.service import Service
from flashvlm_export.runtime.sessions.split import SplitSession
from flashvlm_export.specs import check_budget

#: Answers under way at once, where the engine batches and nothing is said.
MAX_ANSWERS = 8
_MOST_HEADER_BYTES = 32 << 10
# Uvicorn's own, with the lines of requests on standard error, too: standard output is the command's.
_LOGGING = copy.deepcopy(LOGGING_CONFIG)
_LOGGING["handlers"]["access"]["stream"] = "ext://sys.stderr"


def serve(settings: ServerSettings, *, on_ready: Callable[[str, Service, Model], object]) -> None:
    """Answer until a signal comes; a second one leaves what runs unfinished.

    Args:
        settings: of everything.
        on_ready: hears the address, what answers there, and what clients are told of it, once they can connect.

    Raises:
        FlashVLMError: if the address is taken, or the model cannot be opened.
    """
    keys = read_keys(settings)
    with bound_socket(settings.host, settings.port) as listener, opened(settings) as (vlm, service):
        model = describe(vlm, settings)
        app = build_app(model, ServiceAnswerer(service), settings, keys)
        with suppress(KeyboardInterrupt):  # how the command hears of the signal that uvicorn has obeyed
            server_of(app, settings, lambda: on_ready(address_of(listener), service, model)).run(sockets=[listener])
        service.close(finish=False)  # what uvicorn did not wait for, nobody reads


def server_of(app: FastAPI, settings: ServerSettings, on_ready: Callable[[], object] = lambda: None) -> uvicorn.Server:
    """Return what serves ``app`` at a bound socket, until a signal comes or its ``should_exit`` is set."""
    config = uvicorn.Config(
        app,
        http=_protocol(settings.slow_seconds),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="info" if settings.access_log else "warning",
        access_log=settings.access_log,
        log_config=_LOGGING,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        timeout_keep_alive=math.ceil(settings.slow_seconds),
        timeout_graceful_shutdown=math.ceil(settings.max_seconds),
    )
    return _Server(config, on_ready)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # of listening: two processes can hold one address until one of them listens
            if not sockets:
                raise
            host, port = sockets[0].getsockname()[:2]
            raise _not_here(host, port, error) from None
        self._on_ready()


def _protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, but one that leaves clients who are slow for so long.

    Such as do not finish the head of a request, and such as do not take in what is sent to them. The body of a request
    is the guard's.
    """

    class Impatient(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop(self._reading)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop(self._head)
            self._stop(self._reading)

        def _watch_head(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop(self._head)
                self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(seconds, self.transport.abort)

        def _stop(self, timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Impatient


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Hold an address, at which nobody can connect yet.

    Raises:
        ConfigError: if it is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _not_here(host, port, error) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
        except OSError as error:
            raise _not_here(host, port, error) from None
        yield listener


def address_of(listener: socket.socket) -> str:
    """Return the address of a bound socket, for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _not_here(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        "the server cannot listen at this address",
        received=f"{host} port {port}: {error.strerror or error}",
        hint="another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else "--host 127.0.0.1",
    )


@contextmanager
def opened(settings: ServerSettings) -> Iterator[tuple[Pipeline, Service]]:
    """Open the pipeline that the settings ask for, and a service for it."""
    with pipeline_of(settings) as vlm, service_of(vlm, settings) as service:
        yield vlm, service


def service_of(vlm: Pipeline, settings: ServerSettings) -> Service:
    """Return a service for an opened pipeline, closed by ``with``.

    Raises:
        FlashVLMError: if the pipeline is not one for these settings.
    """
    assert vlm.llm is not None  # settings.llm always names one
    if isinstance(settings.token_budget, int):
        check_budget(settings.token_budget, vlm.visual_tokens)
    if (settings.positions or vlm.bundle.manifest.default_positions) == "original":
        vlm.llm.require_gaps()
    most = settings.max_answers or (MAX_ANSWERS if vlm.llm.capabilities.batch else 1)
    return Service(vlm, max_answers=most, max_wait_ms=settings.max_wait_ms, max_queue=settings.max_queue)


def pipeline_of(settings: ServerSettings, *, with_llm: bool = True) -> Pipeline:
    """Return the pipeline that the settings ask for, not opened yet."""
    bundle = Bundle.open(settings.bundle)
    return Pipeline.open(
        bundle,
        precision=settings.precision,
        engine=settings.engine,
        cuda_graphs=settings.cuda_graphs,
        selectors=_selectors(settings, bundle),
        cache_bytes=settings.cache_mib << 20,
        providers=PROVIDERS[settings.provider],
        threads=settings.threads,
        llm=settings.llm if with_llm else None,
    )


def _selectors(settings: ServerSettings, bundle: Bundle) -> Sequence[str] | None:
    if settings.selectors is not None:
        return settings.selectors
    first = next(iter(bundle.manifest.graphs))
    precision: str = settings.precision or first
    if settings.engine is not None or precision not in bundle.manifest.split:
        return None
    return list(bundle.manifest.split[precision].selectors)


def describe(vlm: Pipeline, settings: ServerSettings) -> Model:
    """Return what clients are told of a pipeline."""
    selectors = vlm.session.selectors if isinstance(vlm.session, SplitSession) else ()
    name = settings.name or vlm.bundle.manifest.source.model
    return Model(vlm.inputs, name, vlm.visual_tokens, vlm.default_budget, selectors)


def read_keys(settings: ServerSettings) -> list[str]:
    """Return the keys of the settings' file, none without one; lines that begin with ``#`` are comments.

    Raises:
        ConfigError: if the file cannot be read, or has no key.
    """
    file: Path | None = settings.api_keys
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the API keys cannot be read",
            received=f"{file}: {getattr(error, 'strerror', None) or error}",
            expected="one key a line",
        ) from None
    if bad := [number for number, key in enumerate(keys, 1) if not (key.isascii() and key.isprintable())]:
        raise ConfigError(
            "an API key has characters that no header has", received=f"{file}: key {bad[0]}", expected="ASCII"
        )
    if not keys:
        raise ConfigError("there is no API key", received=f"{file}: no line with text", expected="one key a line")
    return keys
