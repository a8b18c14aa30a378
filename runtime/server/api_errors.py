"""Whatever goes wrong, as OpenAI's error object; never a traceback, and nothing of this machine.

The source of shape and status is OpenAI's API reference: ``{"error": {"message", "type", "param", "code"}}``, 400 for
what the client can mend, 401 without a good key, 404 for another model, 413 and 408 for what is too large or too slow,
503 where asking again later helps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from flashvlm_export.errors import (
    BudgetError,
    FlashVLMError,
    ImageError,
    PromptTooLongError,
    QueueFullError,
    UsageError,
)

log = logging.getLogger("flashvlm.server")

#: Headers of an error after which asking again helps.
LATER = {"Retry-After": "1"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people.
        param: field of the request that is to blame.
        code: for machines.
        kind: OpenAI's ``type``.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def __reduce__(self) -> tuple[Any, ...]:
        """Across processes, where Ray's replicas raise it."""
        error = self.body["error"]
        given = (self.status, error["message"], error["param"], error["code"], error["type"], self.headers)
        return _api_error, given


def _api_error(
    status: int, message: str, param: str | None, code: str | None, kind: str, headers: dict[str, str]
) -> ApiError:
    return ApiError(status, message, param=param, code=code, kind=kind, headers=headers)


def api_error(error: Exception) -> ApiError:
    """Return ``error`` as a client is to see it; one that is ours to mend goes into the log, which alone tells it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(503, _text(error), code="overloaded", kind="server_error", headers=LATER)
    if isinstance(error, ImageError):
        return ApiError(400, _text(error), param="messages", code="invalid_image")
    if isinstance(error, BudgetError):
        return ApiError(400, _text(error), param="token_budget", code="invalid_value")
    if isinstance(error, PromptTooLongError):
        return ApiError(400, _text(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, _text(error), code="invalid_value")
    log.error("a request failed", exc_info=error)
    return _defect()


def answer_errors(app: FastAPI, on_error: Callable[[str, int], object] = lambda route, status: None) -> None:
    """Have ``app`` answer with what its routes raise, and what leads to none of them.

    Args:
        app: the application.
        on_error: hears route and status.
    """

    async def answer(request: Request, error: Exception) -> JSONResponse:
        found = _raised(request, error)
        on_error(route_of(request.scope), found.status)
        return JSONResponse(found.body, found.status, found.headers)

    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def route_of(scope: Scope) -> str:
    """Return the path of a request below where the application is mounted, as routes are found by."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _raised(request: Request, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _not_valid(error, request.headers.get("content-type", "none"))
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return _defect()  # uvicorn logs it


def _defect() -> ApiError:
    return ApiError(500, "the server failed; its log says how", code="internal_error", kind="server_error")


def _not_valid(error: RequestValidationError, content_type: str) -> ApiError:
    """Name the first field that is wrong, as OpenAI does; where it could be one of several things, each of them."""
    errors = [(each["loc"][1:], each) for each in error.errors()]
    place, first = errors[0]
    if not place or first["type"] == "json_invalid":
        named = content_type.partition(";")[0].strip().lower() == "application/json"
        wrong = first["msg"] if named else f"its Content-Type is {content_type[:80]}, not application/json"
        return ApiError(400, f"the request's body is not what was expected: {wrong}", code=str(first["type"]))
    of_nothing = first.get("ctx", {}).get("max_length") == 0
    if first["type"] == "extra_forbidden" or of_nothing:
        return ApiError(400, f"{place[0]} is not supported here", param=str(place[0]), code="unsupported_parameter")
    of_it = [(where, each["msg"]) for where, each in errors if where[:1] == place[:1]][:4]
    message = "; or ".join(f"{'.'.join(map(str, where))}: {text}" for where, text in of_it)
    return ApiError(400, message, param=str(place[0]), code=str(first["type"]))


def _text(error: FlashVLMError) -> str:
    """The message in one line, without the hint, which is for the command line."""
    parts = [("received", error.received), ("expected", error.expected)]
    named = "; ".join(f"{name}: {value}" for name, value in parts if value is not None)
    return f"{error.what} ({named})" if named else error.what
