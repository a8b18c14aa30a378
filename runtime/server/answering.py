"""What is asked → what is kept of the images, then pieces of text, then how it went.

An :class:`Answerer` is all that the routes know of a model: here a :class:`Service` in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from flashvlm_export.runtime.image_cache import CacheStats
from flashvlm_export.runtime.request import Answer, PrunedPrompt
from flashvlm_export.runtime.server.conversation import Asked
from flashvlm_export.runtime.service import Service


@dataclass(frozen=True)
class KeptTokens:
    """What is kept of one image.

    Attributes:
        grids: rows and columns of the grids that its visual tokens form one after the other, each over the whole view.
        indices: which ones are kept, ascending.
    """

    grids: list[tuple[int, int]]
    indices: list[int]


@dataclass(frozen=True)
class Done:
    """How an answer went; see :class:`GenerationStats` and :class:`PrunedPrompt`."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int
    visual_tokens: int
    kept_tokens: int
    stage_ms: dict[str, float]


#: In this order: once what is kept of each image, any number of texts, once how it went.
Event: TypeAlias = list[KeptTokens] | str | Done


@dataclass(frozen=True)
class Load:
    """What a model is busy with.

    Attributes:
        waiting: requests in the queue.
        under_way: requests that are being answered.
        batch_sizes: how often so many requests were encoded together, since the start.
        cache: of encoded images.
    """

    waiting: int
    under_way: int
    batch_sizes: dict[int, int]
    cache: CacheStats


class Answerer(Protocol):
    """Answers any number of requests at a time."""

    def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer, or raise; closing the generator gives the request up."""
        ...

    def is_ready(self) -> bool:
        """Whether requests are taken."""
        ...

    def load(self) -> Load | None:
        """What it is busy with; ``None`` where that is counted elsewhere."""
        ...


class ServiceAnswerer:
    """Answers with a service in this process."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        """See :class:`Answerer`."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[list[KeptTokens] | str | Future[Answer]] = asyncio.Queue()

        def tell(event: list[KeptTokens] | str | Future[Answer]) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        future = self._service.submit(
            asked.request,
            asked.pruning,
            asked.params,
            on_prompt=lambda prompt: tell(kept_tokens(prompt)),
            on_text=tell,
        )
        future.add_done_callback(tell)
        try:
            while not isinstance(event := await events.get(), Future):
                yield event
            yield done(event.result())
        finally:
            future.cancel()

    def is_ready(self) -> bool:
        """See :class:`Answerer`."""
        return self._service.is_open

    def load(self) -> Load:
        """See :class:`Answerer`."""
        service = self._service
        return Load(service.waiting, service.under_way, dict(service.batch_sizes), service.vlm.images.stats)


def kept_tokens(prompt: PrunedPrompt) -> list[KeptTokens]:
    """Return what is kept of each image of ``prompt``."""
    return [KeptTokens(list(image.layout.grids), image.indices.tolist()) for image in prompt.images]


def done(answer: Answer) -> Done:
    """Return how ``answer`` went."""
    stats, prompt = answer.stats, answer.prompt
    assert stats.finish_reason != "closed"  # that one has no answer
    return Done(
        stats.finish_reason,
        stats.prompt_tokens,
        stats.new_tokens,
        prompt.visual_tokens_before,
        prompt.visual_tokens_kept,
        answer.stage_ms,
    )
