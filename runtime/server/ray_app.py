"""The server on many machines: a Ray Serve application, started with Ray's own command.

::

    serve run flashvlm_export.runtime.server.ray_app:app bundle=/bundles/llava visual_replicas=2 decoder_replicas=2

The same routes as ``flashvlm serve``, answered by replicas of three kinds: ``Ingress`` takes requests in and checks
them, ``Visual`` encodes and selects what has arrived together, and ``Decoder`` runs a service with the language model
alone. Kept tokens travel from one to the other, a megabyte or two for an image.

A replica that dies takes with it what it was working on. A request that has no text yet is asked once more, of another
replica; one whose answer has begun fails, and says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import ConfigError, FlashVLMError
from flashvlm_export.runtime.request import Pruning, Request, SelectedImage
from flashvlm_export.runtime.server.answering import Done, Event, Load, ServiceAnswerer
from flashvlm_export.runtime.server.api_errors import LATER, ApiError
from flashvlm_export.runtime.server.app import build_app
from flashvlm_export.runtime.server.conversation import Asked
from flashvlm_export.runtime.server.listening import describe, pipeline_of, read_keys, service_of
from flashvlm_export.runtime.server.settings import Count, Duration, ServerSettings

# Requests for each replica beyond which autoscaling adds one.
_ONGOING_REQUESTS = 4

#: What is kept of the images of a request, and the milliseconds of each stage.
Selected = tuple[list[SelectedImage], dict[str, float]]


class ClusterSettings(ServerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server obeys, and how many replicas there are. Address and port are Ray's."""

    visual_replicas: Annotated[Count, msgspec.Meta(description="replicas that encode and select")] = 1
    most_visual_replicas: Annotated[Count | None, msgspec.Meta(description="as many under load")] = None
    visual_batch: Annotated[Count, msgspec.Meta(description="requests that are encoded together")] = 8
    visual_gpus: Annotated[Duration, msgspec.Meta(description="GPUs of each of them, or a part of one")] = 0.0
    decoder_replicas: Annotated[Count, msgspec.Meta(description="replicas that answer")] = 1
    most_decoder_replicas: Annotated[Count | None, msgspec.Meta(description="as many under load")] = None
    decoder_gpus: Annotated[Duration, msgspec.Meta(description="GPUs of each of them, or a part of one")] = 0.0
    replica_cpus: Annotated[Duration, msgspec.Meta(description="processor cores that each replica asks for")] = 1.0


def app(args: Mapping[str, Any]) -> serve.Application:
    """Return the application; Ray calls it with what its command line says behind it, or its YAML file.

    Raises:
        ConfigError: if a setting does not exist, or is out of range.
        BundleError: if there is no such bundle, or it is damaged.
    """
    settings = ClusterSettings.of(args)
    if {"host", "port"} & set(args):
        raise ConfigError("address and port of a cluster are Ray's", received="host or port", expected="http_options")
    Bundle.open(settings.bundle)  # else each replica would say so, again and again
    cpus = settings.replica_cpus

    def asgi() -> FastAPI:
        return _ingress_app(settings)

    visual = serve.deployment(
        name="Visual",
        max_ongoing_requests=2 * settings.visual_batch,
        ray_actor_options={"num_cpus": cpus, "num_gpus": settings.visual_gpus},
        **_count(settings.visual_replicas, settings.most_visual_replicas),
    )(_Visual)
    decoder = serve.deployment(
        name="Decoder",
        max_ongoing_requests=settings.max_queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": settings.decoder_gpus},
        **_count(settings.decoder_replicas, settings.most_decoder_replicas),
    )(_Decoder)
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=1000,  # of which each waits for replicas behind it, which have limits of their own
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(asgi)())
    return ingress.bind(visual.bind(settings), decoder.bind(settings))


def _count(replicas: int, most: int | None) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": replicas}
    scaling = {"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": _ONGOING_REQUESTS}
    return {"autoscaling_config": scaling}


class _Visual:
    """Encodes images and selects their tokens, of requests that arrive together in one batch."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._vlm = pipeline_of(settings, with_llm=False)
        self._vlm.load()
        batching: Any = self.select  # the decorator adds methods that its type does not have
        batching.set_max_batch_size(settings.visual_batch)
        batching.set_batch_wait_timeout_s(settings.max_wait_ms / 1e3)

    @serve.batch
    async def select(self, asked: list[tuple[Request, Pruning]]) -> list[Selected | FlashVLMError]:
        return await asyncio.to_thread(self._select, asked)

    def _select(self, asked: Sequence[tuple[Request, Pruning]]) -> list[Selected | FlashVLMError]:
        try:
            prompts = self._vlm.encode_each(asked)
        except FlashVLMError as error:
            # It belongs to one of them: each alone, the others do not notice.
            return [error] if len(asked) == 1 else [self._select([each])[0] for each in asked]
        return [(prompt.images, prompt.stage_ms) for prompt in prompts]


class _Decoder:
    """Answers prompts whose images are selected, as many side by side as its engine batches."""

    def __init__(self, settings: ClusterSettings) -> None:
        vlm = pipeline_of(settings)
        vlm.load(visual=False)
        self._answerer = ServiceAnswerer(service_of(vlm, settings))

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        async for event in self._answerer.answer(asked):
            yield event

    def check_health(self) -> None:
        if not self._answerer.is_ready():
            raise RuntimeError("the service has broken down")


def _ingress_app(settings: ClusterSettings) -> FastAPI:
    name = serve.get_replica_context().app_name
    answerer = _ClusterAnswerer(
        serve.get_deployment_handle("Visual", app_name=name), serve.get_deployment_handle("Decoder", app_name=name)
    )
    return build_app(describe(pipeline_of(settings, with_llm=False), settings), answerer, settings, read_keys(settings))


class _ClusterAnswerer:
    """Has one replica select, and another answer."""

    def __init__(self, visual: DeploymentHandle[Any], decoder: DeploymentHandle[Any]) -> None:
        self._visual, self._decoder = visual, decoder.options(stream=True)

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        told = said = False
        try:
            async for event in self._once(asked):
                told, said = True, said or isinstance(event, str)
                yield event
            return
        except _Lost:
            if said:  # half an answer cannot be taken back
                raise
        async for event in self._once(asked):
            if not (told and isinstance(event, list)):
                yield event

    async def _once(self, asked: Asked) -> AsyncGenerator[Event, None]:
        answers: Any = None
        try:
            selected = await self._visual.select.remote((asked.request, asked.pruning))
            if isinstance(selected, FlashVLMError):
                raise selected
            images, before_ms = selected
            answers = self._decoder.answer.remote(replace(asked, request=_with_selected(asked.request, images)))
            async for event in answers:
                yield _with_times(event, before_ms) if isinstance(event, Done) else event
        except RayActorError:
            raise _Lost from None
        except BackPressureError:
            message = "too many requests are waiting"
            raise ApiError(503, message, code="overloaded", kind="server_error", headers=LATER) from None
        except RayTaskError as error:  # the replica's own error is inside
            raise error.cause from None
        finally:
            if answers is not None:
                answers.cancel()

    def is_ready(self) -> bool:
        return True

    def load(self) -> Load | None:
        """Ray counts what its replicas do."""
        return None


class _Lost(ApiError):
    """The replica that worked on a request has died."""

    def __init__(self) -> None:
        super().__init__(
            503, "the replica that worked on this was lost", code="replica_lost", kind="server_error", headers=LATER
        )


def _with_times(done: Done, before_ms: Mapping[str, float]) -> Done:
    names = {**before_ms, **done.stage_ms}
    return replace(done, stage_ms={name: before_ms.get(name, 0) + done.stage_ms.get(name, 0) for name in names})


def _with_selected(request: Request, images: Sequence[SelectedImage]) -> Request:
    """Return ``request`` with what is kept in place of each of its images."""
    left = iter(images)
    history = [replace(past, images=[next(left) for _ in past.images]) for past in request.history]
    return replace(request, history=history, images=[next(left) for _ in request.images])
