"""A vLLM server over HTTP: continuous batching, several GPUs, several nodes; see ``docs/serving.md``.

The server is started by the user with ``--enable-prompt-embeds`` and answers OpenAI's completions endpoint.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np

from flashvlm_export.errors import LLMError, SessionError, UsageError
from flashvlm_export.runtime.llm.base import Capabilities, Embed, Generation, Limits, LLMEngine
from flashvlm_export.runtime.llm.torch_file import torch_bytes
from flashvlm_export.specs import Array

_START = "vllm serve TEXT --enable-prompt-embeds, TEXT being the language model alone (docs/llm-engines.md)"
_TRIES = 3
_BUSY = (http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE)
_HINTS: dict[int, str] = {
    401: "set the variable VLLM_API_KEY to the server's key",
    403: "set the variable VLLM_API_KEY to the server's key",
    404: "give the address of its completions endpoint, such as http://localhost:8000/v1",
}


class VllmLLM(LLMEngine):
    """Sends prompts to a server, each answer over a connection of its own; the server batches what is under way.

    A request that never reached the server, or that it was too busy for, is sent again, up to three times in all. An
    answer that breaks off is not: what was read of it stands.

    Args:
        url: where the endpoints are, such as ``http://localhost:8000/v1``.
        embed: embedding rows of the bundle, which the server's model is checked to have.
        vocab_size: rows of that table.
        timeout_s: longest silence of the server, in seconds.

    Raises:
        UsageError: if ``url`` is none.

    The key of a server that asks for one is taken from the variable ``VLLM_API_KEY``.
    """

    name = "vllm"
    capabilities = Capabilities(
        embeddings=True, explicit_positions=False, batch=True, streaming=True, sampling=True, prefix_reuse=False
    )

    def __init__(self, url: str, embed: Embed, vocab_size: int, *, timeout_s: float = 120.0) -> None:
        super().__init__()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
            raise UsageError(
                "this is not the address of a server", received=repr(url), expected="such as http://localhost:8000/v1"
            )
        self.url = url.rstrip("/")
        self.embed = embed
        self.vocab_size = vocab_size
        self.timeout_s = timeout_s
        self._model = ""

    def _open(self) -> Limits:
        try:
            served = self._ask("GET", "/models")["data"][0]
            self._model, positions = str(served["id"]), int(served["max_model_len"])
        except (ValueError, LookupError, TypeError) as error:
            raise SessionError(
                "the server at this address is no vLLM server",
                received=f"{self.url}/models: {error!r}",
                expected="the address of its completions endpoint, such as http://localhost:8000/v1",
            ) from error
        require_same_answer(self._model, self.embed, self.vocab_size, self._say_one)
        width = self.embed(np.zeros(1, np.int64)).shape[1]
        return Limits(width, positions, self.vocab_size)

    def _close(self) -> None:
        self._model = ""

    @property
    def identity(self) -> str:
        """The engine and the server's name of its model, once it is open."""
        return f"{self.name} {self._model or self.url}"

    def _say_one(self, prompt: Array) -> tuple[list[int], float]:
        """Return the likeliest token behind ids ``[n]`` or rows ``[n, D]``, and its log-probability."""
        given = {"prompt": prompt.tolist()} if prompt.ndim == 1 else self._prompt(prompt)
        settings = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "return_token_ids": True}
        try:
            choice = self._ask("POST", "/completions", given | settings | {"model": self._model})["choices"][0]
            return choice["token_ids"], float(choice["logprobs"]["token_logprobs"][0])
        except (ValueError, LookupError, TypeError) as error:
            raise self._broke_off(repr(error)) from error

    def _prompt(self, rows: Array) -> dict[str, Any]:
        return {"prompt_embeds": base64.b64encode(torch_bytes(rows)).decode()}

    def _generate(self, generation: Generation) -> Generator[int, None, None]:
        params = generation.params
        request = self._prompt(generation.rows) | {
            "model": self._model,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "seed": params.seed,
            # What the server's model would otherwise bring along.
            "repetition_penalty": 1.0,
            "min_p": 0.0,
            "ignore_eos": True,
            "stop_token_ids": sorted(generation.stop_token_ids),
            "stream": True,
            "return_token_ids": True,
        }
        with self._sent("POST", "/completions", request) as response:
            for event in self._events(response):
                if "error" in event:
                    raise self._broke_off(_message(event))
                for choice in event.get("choices", ()):
                    if choice.get("text") and not choice.get("token_ids"):
                        raise LLMError(
                            "the vLLM server answers in text alone",
                            received=repr(choice["text"]),
                            expected="token ids too, as return_token_ids asks for",
                            hint="upgrade vLLM on the server",
                        )
                    yield from choice.get("token_ids") or ()

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """Yield the objects of an event stream; raise unless it is complete."""
        try:
            while line := response.readline():
                if line.startswith(b"data: "):
                    if line.strip() == b"data: [DONE]":
                        return
                    yield json.loads(line[6:])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._broke_off(repr(error)) from error
        raise self._broke_off("the connection closed before the end of the answer")

    def _broke_off(self, received: str) -> LLMError:
        return LLMError(
            "the vLLM server broke off the answer",
            received=received,
            expected=f"an answer to the end, no silence longer than {self.timeout_s:g} s",
            hint="look at its log; ask again when it is back",
        )

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the whole answer to a request, decoded."""
        with self._sent(method, path, body) as response:
            try:
                return json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                raise self._broke_off(repr(error)) from error

    @contextmanager
    def _sent(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield the response, if it succeeded; the connection ends with it.

        So the server knows, too, that nobody reads on.
        """
        connection, response = self._answered(method, path, None if body is None else json.dumps(body))
        with closing(connection), response:
            if response.status != http.client.OK:
                said = response.read().decode(errors="replace")
                raise LLMError(
                    "the vLLM server refused the request",
                    received=f"{self.url}{path}: {response.status} {response.reason}: {_message(said)}",
                    hint=_HINTS.get(response.status, _START if "embeds" in said else None),
                )
            yield response

    def _answered(
        self, method: str, path: str, content: str | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Return an open connection and the response on it; try again where nobody listens or the server is busy."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        for left in reversed(range(_TRIES)):
            connection = kind(parts.netloc, timeout=self.timeout_s)
            try:
                connection.connect()
            except OSError as error:
                connection.close()
                if not left:
                    raise LLMError(
                        "the vLLM server cannot be reached", received=f"{self.url}: {error}", hint=_START
                    ) from error
                time.sleep(1)
                continue
            try:
                connection.request(method, parts.path + path, content, headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise self._broke_off(repr(error)) from error
            if response.status not in _BUSY or not left:
                return connection, response
            response.close()
            connection.close()
            time.sleep(1)
        raise AssertionError("the last try returns or raises")


def require_same_answer(
    model: str, embed: Embed, vocab_size: int, say_one: Callable[[Array], tuple[list[int], float]]
) -> None:
    """Raise :class:`LLMError` if a model says something else to token ids than to a bundle's embeddings of them.

    For engines that do not show the rows of their embedding table.

    Args:
        model: its name.
        embed: embedding rows of the bundle.
        vocab_size: how many there are.
        say_one: token ids ``[n]``, or rows ``[n, D]``, to the token that follows and its log-probability.
    """
    ids = np.linspace(1, vocab_size - 1, 6).astype(np.int64)
    to_ids, to_rows = say_one(ids), say_one(embed(ids))
    # Half precision moves a log-probability by some hundredths; other embeddings move it by whole numbers.
    if to_ids[0] != to_rows[0] or abs(to_ids[1] - to_rows[1]) > 0.2:
        raise LLMError(
            "the language model is not the one that the bundle was exported with",
            received=f"{model} says {to_ids} to token ids, {to_rows} to their embeddings",
            expected="the same to both",
            hint=f"give vLLM the language model of the bundle's checkpoint: {_START}",
        )


def _has_port(parts: SplitResult) -> bool:
    """Whether what stands in place of a port is one, or nothing."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _message(said: str | dict[str, Any]) -> str:
    """Return what a server says in OpenAI's error object, or all that it says, shortened."""
    text = str(said)
    with suppress(ValueError, AttributeError):  # no JSON, or no such object: then all of it is what the server says
        found = json.loads(said) if isinstance(said, str) else said
        text = str(found.get("error", found).get("message", text))
    return text if len(text) <= 500 else text[:500] + " …"
