"""The routes: OpenAI's, those of orchestrators, and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from anyio import current_time, move_on_after
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from flashvlm_export.runtime.server.answering import Answerer, Done, Event, KeptTokens
from flashvlm_export.runtime.server.api_errors import ApiError, answer_errors, api_error
from flashvlm_export.runtime.server.conversation import Intake, Model
from flashvlm_export.runtime.server.guard import Guard
from flashvlm_export.runtime.server.metrics import Metrics
from flashvlm_export.runtime.server.reading import Reading
from flashvlm_export.runtime.server.replies import DONE_EVENT, Reply, event
from flashvlm_export.runtime.server.schema import ChatRequest
from flashvlm_export.runtime.server.settings import ServerSettings

T = TypeVar("T")

CHAT = "/v1/chat/completions"
PAGE = Path(__file__).parent / "page"

# nginx would collect a stream.
_NOT_BUFFERED = {"X-Accel-Buffering": "no"}


def build_app(model: Model, answerer: Answerer, settings: ServerSettings, keys: Sequence[str] = ()) -> FastAPI:
    """Return the application.

    Args:
        model: that answers.
        answerer: how it is asked.
        settings: limits of requests.
        keys: one of which every request has to bring; empty lets everybody in.
    """
    # Their pages load scripts from elsewhere.
    app = FastAPI(title="flashvlm-export", docs_url=None, redoc_url=None)
    metrics = Metrics(answerer)
    intake = Intake(model, settings)
    reading = Reading(intake.asked, settings.max_queue)
    created = int(time.time())
    default_budget = settings.token_budget or model.default_budget

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
        return card()

    def card() -> dict[str, Any]:
        ours = {
            "visual_tokens": model.visual_tokens,
            "default_budget": model.visual_tokens if default_budget == "full" else default_budget,
            "selectors": list(model.selectors),
            "max_images": settings.max_images,
            "max_image_pixels": intake.pictures.limit_pixels,
            "max_body_bytes": settings.max_body_mib << 20,
        }
        return {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "flashvlm-export",
            "flashvlm": ours,
        }

    @app.post(CHAT)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        start = time.perf_counter()
        deadline = current_time() + settings.max_seconds
        try:
            asked = await _while_connected(request, _before(deadline, reading(body)))
            if asked is None:
                return _gone(metrics)
            reply = Reply(model.name, asked.views, body.selection)
            events = _counted(answerer.answer(asked), deadline, start, metrics)
            if body.stream:
                # Up to here an error still has a status of its own.
                kept = await _while_connected(request, anext(events))
                if kept is None:
                    await events.aclose()
                    return _gone(metrics)
                usage = body.stream_options is not None and body.stream_options.include_usage
                chunks = _chunks(reply, kept, events, metrics, with_usage=usage)
                return StreamingResponse(chunks, media_type="text/event-stream", headers=_NOT_BUFFERED)
            whole = await _while_connected(request, _collected(events))
            if whole is None:
                return _gone(metrics)
        except Exception as error:  # whatever it is, the client sees it in OpenAI's shape
            raise api_error(error) from error
        metrics.ended("200")
        return JSONResponse(reply.whole(*whole))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        good = answerer.is_ready()
        return JSONResponse({"status": "ready" if good else "not ready"}, 200 if good else 503)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return PlainTextResponse(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    files = {file.name: file for file in sorted(PAGE.iterdir()) if file.is_file()}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name])

    def ended(route: str, status: int) -> None:
        if route == CHAT:
            metrics.ended(str(status))

    answer_errors(app, ended)
    open_paths = ["/health", "/ready", "/", *(f"/page/{name}" for name in files)]
    app.add_middleware(Guard, settings=settings, keys=keys, open_paths=open_paths, on_refused=ended)
    return app


async def _before(deadline: float, work: Awaitable[T]) -> T:
    """Return what ``work`` does, before ``deadline``, in seconds of the event loop's clock."""
    with move_on_after(max(deadline - current_time(), 0)) as scope:
        return await work
    assert scope.cancelled_caught  # there is no other way here
    message = "the answer was not there in time"
    # Clients would ask twice more, for what takes as long again.
    headers = {"x-should-retry": "false"}
    raise ApiError(504, message, code="timeout", kind="server_error", headers=headers)


async def _counted(
    answer: AsyncGenerator[Event, None], deadline: float, start: float, metrics: Metrics
) -> AsyncGenerator[Event, None]:
    """Yield the events of an answer that has time until ``deadline``, and count them."""
    has_text = False
    async with aclosing(answer) as events:
        while True:
            try:
                one = await _before(deadline, anext(events))
            except StopAsyncIteration:
                return
            if isinstance(one, str) and not has_text:
                has_text = True
                metrics.first_text(time.perf_counter() - start)
            if isinstance(one, Done):
                metrics.answered(one)
            yield one


async def _collected(events: AsyncGenerator[Event, None]) -> tuple[list[KeptTokens], str, Done]:
    async with aclosing(events):
        kept, *texts, done = [each async for each in events]
        assert isinstance(kept, list)  # the order of events
        assert isinstance(done, Done)
        return kept, "".join(text for text in texts if isinstance(text, str)), done


async def _chunks(
    reply: Reply, kept: Event, events: AsyncGenerator[Event, None], metrics: Metrics, *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    outcome = "gone"
    try:
        async with aclosing(events):
            assert isinstance(kept, list)  # the order of events
            yield reply.first_chunk(kept)
            async for one in events:
                if isinstance(one, str):
                    yield reply.text_chunk(one)
                elif isinstance(one, Done):
                    yield reply.last_chunk(one)
                    if with_usage:
                        yield reply.usage_chunk(one)
            outcome = "200"
            yield DONE_EVENT
    except Exception as error:  # the response has begun: whatever it is, the stream has to say it
        found = api_error(error)
        outcome = str(found.status)
        yield event(found.body)
    finally:
        metrics.ended(outcome)


async def _while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """Return what ``work`` does, ``None`` if the client has gone before, for whom it is then given up."""
    task = asyncio.ensure_future(work)

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait((task, gone))


def _gone(metrics: Metrics) -> Response:
    metrics.ended("gone")
    return Response(status_code=499)
