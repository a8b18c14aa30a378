"""The server on many machines: a Ray Serve application, started with Ray's own command.

::

    serve run flashvlm_export.runtime.server.ray_app:app bundle=/bundles/llava visual_replicas=2 decoder_replicas=2

The same routes as ``flashvlm serve``, answered by replicas of three kinds: ``Ingress`` takes requests in and checks
them, ``Visual`` encodes and selects what has arrived together, and ``Decoder`` runs a service with the language model
alone. Kept tokens travel from one to the other, a megabyte or two for an image.

A replica that dies takes with it what it was working on. A request that has no text yet is asked once more, of another
replica; one whose answer has begun fails, and says so.

A replica gets as many requests as it works on. Those that wait do so at the ingress, where the death of a replica does
not touch them, and where one more than may wait is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve import exceptions as of_serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import ConfigError
from flashvlm_export.runtime.request import Pruning, Request, SelectedImage
from flashvlm_export.runtime.server.answering import Done, Event, Load, ServiceAnswerer
from flashvlm_export.runtime.server.api_errors import LATER, ApiError, api_error
from flashvlm_export.runtime.server.app import build_app
from flashvlm_export.runtime.server.conversation import Asked
from flashvlm_export.runtime.server.listening import MAX_ANSWERS, describe, pipeline_of, read_keys, service_of
from flashvlm_export.runtime.server.settings import Amount, Count, ServerSettings
from flashvlm_export.specs import check_budget

log = logging.getLogger("flashvlm.server")

# Requests for each replica beyond which autoscaling adds one, where it works on as many side by side.
_ONGOING_REQUESTS = 4
# Time between two looks at each replica by Ray, and at what Ray found by the ingress.
_HEALTH_PERIOD_S = 2.0
_READY_PERIOD_S = 1.0

# What may be raised where a replica, its machine, or what it has computed is no more; Ray 2.40 has not the later ones.
_LATER_LOSSES = ("DeploymentUnavailableError", "ReplicaUnavailableError")
_LOSSES: tuple[type[Exception], ...] = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,  # which an owner that died is, too
    WorkerCrashedError,
    *(getattr(of_serve, name) for name in _LATER_LOSSES if hasattr(of_serve, name)),
)

#: What is kept of the images of a request, and the milliseconds of each stage.
Selected = tuple[list[SelectedImage], dict[str, float]]


class ClusterSettings(ServerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server obeys, and how many replicas there are. Address and port are Ray's."""

    visual_replicas: Annotated[Count, msgspec.Meta(description="replicas that encode and select")] = 1
    most_visual_replicas: Annotated[Count | None, msgspec.Meta(description="as many under load")] = None
    visual_batch: Annotated[Count, msgspec.Meta(description="requests that are encoded together")] = 8
    visual_gpus: Annotated[Amount, msgspec.Meta(description="GPUs of each of them, or a part of one")] = 0.0
    decoder_replicas: Annotated[Count, msgspec.Meta(description="replicas that answer")] = 1
    most_decoder_replicas: Annotated[Count | None, msgspec.Meta(description="as many under load")] = None
    decoder_gpus: Annotated[Amount, msgspec.Meta(description="GPUs of each of them, or a part of one")] = 0.0
    replica_cpus: Annotated[Amount, msgspec.Meta(description="processor cores that each replica asks for")] = 1.0
    ingress_replicas: Annotated[Count, msgspec.Meta(description="replicas that take requests in")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in ("visual", "decoder"):
            least, most = getattr(self, f"{kind}_replicas"), getattr(self, f"most_{kind}_replicas")
            if most is not None and most < least:
                raise ValueError(f"most_{kind}_replicas {most} is below {kind}_replicas {least}")

    @property
    def visual_at_once(self) -> int:
        """Requests of one replica that encodes: a batch, and the next one."""
        return 2 * self.visual_batch

    @property
    def answers_at_once(self) -> int:
        """Requests of one replica that answers."""
        return self.max_answers or MAX_ANSWERS

    @property
    def ingress_at_once(self) -> int:
        """Requests of one replica that takes them in.

        All that those behind it work on, all that may wait for them, and as many again that are on their way in, or
        are being refused.
        """
        visual = (self.most_visual_replicas or self.visual_replicas) * self.visual_at_once
        decoder = (self.most_decoder_replicas or self.decoder_replicas) * self.answers_at_once
        return max(2 * (visual + decoder + 2 * self.max_queue), 100)


def app(args: Mapping[str, Any]) -> serve.Application:
    """Return the application; Ray calls it with what its command line says behind it, or its YAML file.

    Raises:
        ConfigError: if a setting does not exist, or is out of range.
        BundleError: if there is no such bundle, or it is damaged.
        BudgetError: if its images have fewer visual tokens.
    """
    settings = ClusterSettings.of(args)
    if {"host", "port"} & set(args):
        raise ConfigError("address and port of a cluster are Ray's", received="host or port", expected="http_options")
    # Else each replica would say so, again and again.
    bundle = Bundle.open(settings.bundle)
    if isinstance(settings.token_budget, int):
        check_budget(settings.token_budget, bundle.manifest.dims.num_patches)
    cpus = settings.replica_cpus

    def asgi() -> FastAPI:
        return _ingress_app(settings)

    visual = serve.deployment(
        name="Visual",
        max_ongoing_requests=settings.visual_at_once,
        max_queued_requests=settings.max_queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": settings.visual_gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=settings.max_seconds,
        **_count(
            settings.visual_replicas, settings.most_visual_replicas, max(_ONGOING_REQUESTS, settings.visual_batch)
        ),
    )(_Visual)
    decoder = serve.deployment(
        name="Decoder",
        max_ongoing_requests=settings.answers_at_once,
        max_queued_requests=settings.max_queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": settings.decoder_gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=settings.max_seconds,
        **_count(
            settings.decoder_replicas, settings.most_decoder_replicas, min(_ONGOING_REQUESTS, settings.answers_at_once)
        ),
    )(_Decoder)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=settings.ingress_at_once,
        # Ray's proxy refuses those beyond, in words of its own. It counts those that are just passed on, too.
        max_queued_requests=settings.ingress_at_once,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.max_seconds,
    )(serve.ingress(asgi)())
    return ingress.bind(visual.bind(settings), decoder.bind(settings))


def _count(replicas: int, most: int | None, ongoing_requests: int) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": replicas}
    scaling = {"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": ongoing_requests}
    return {"autoscaling_config": scaling}


class _Visual:
    """Encodes images and selects their tokens, together for all requests that came while it was busy with others."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._vlm = pipeline_of(settings, with_llm=False)
        self._vlm.load()
        self._most, self._wait_s = settings.visual_batch, settings.max_wait_ms / 1e3
        self._waiting: deque[tuple[tuple[Request, Pruning], asyncio.Future[Selected | Exception]]] = deque()
        self._work: asyncio.Task[None] | None = None

    async def select(self, asked: tuple[Request, Pruning]) -> Selected | Exception:
        future: asyncio.Future[Selected | Exception] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._work is None:
            self._work = asyncio.create_task(self._until_none_waits())
        return await future

    async def _until_none_waits(self) -> None:
        await asyncio.sleep(self._wait_s)  # for company
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            batch = [(asked, future) for asked, future in batch if not future.cancelled()]
            found = await asyncio.to_thread(self._select, [asked for asked, _ in batch])
            for (_, future), one in zip(batch, found, strict=True):
                if not future.cancelled():
                    future.set_result(one)
        self._work = None

    def _select(self, asked: Sequence[tuple[Request, Pruning]]) -> list[Selected | Exception]:
        if not asked:
            return []
        try:
            prompts = self._vlm.encode_each(asked)
        except Exception as error:  # whatever it is, it belongs to one of them: each alone, the others do not notice
            if len(asked) > 1:
                return [self._select([each])[0] for each in asked]
            if api_error(error).status == 500:
                log.error("images could not be encoded", exc_info=error)
            return [error]
        return [(prompt.images, prompt.stage_ms) for prompt in prompts]


class _Decoder:
    """Answers prompts whose images are selected, as many side by side as its engine batches."""

    def __init__(self, settings: ClusterSettings) -> None:
        # Whatever Ray lets through is taken; an engine that does not batch lets the others wait.
        most = max(settings.max_queue, settings.answers_at_once)
        settings = msgspec.structs.replace(settings, max_queue=most, engine=None, cache_mib=0)
        vlm = pipeline_of(settings)
        vlm.load(visual=False)
        self._answerer = ServiceAnswerer(service_of(vlm, settings))

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        async with aclosing(self._answerer.answer(asked)) as events:
            async for event in events:
                yield event

    def check_health(self) -> None:
        if not self._answerer.is_ready():
            raise RuntimeError("the service has broken down")


def _ingress_app(settings: ClusterSettings) -> FastAPI:
    name = serve.get_replica_context().app_name
    answerer = _ClusterAnswerer(
        serve.get_deployment_handle("Visual", app_name=name),
        serve.get_deployment_handle("Decoder", app_name=name),
        lambda: _both_run(name),
    )
    # Where Ray's proxies listen is not said here: only the names that are set bind.
    settings = msgspec.structs.replace(settings, host="0.0.0.0", cache_mib=0)
    return build_app(describe(pipeline_of(settings, with_llm=False), settings), answerer, settings, read_keys(settings))


def _both_run(name: str) -> bool:
    """Whether Ray's controller knows of a running replica of both kinds; blocks until it has said so."""
    application = serve.status().applications.get(name)
    running = {
        kind
        for kind, deployment in (application.deployments.items() if application else ())
        for state, count in deployment.replica_states.items()
        if state == "RUNNING" and count > 0
    }
    return {"Visual", "Decoder"} <= running


class _ClusterAnswerer:
    """Has one replica select, and another answer.

    Args:
        visual: replicas that select.
        decoder: replicas that answer.
        both_run: whether there are any of each; may block. Those are not asked themselves: they may be full.
    """

    def __init__(
        self, visual: DeploymentHandle[Any], decoder: DeploymentHandle[Any], both_run: Callable[[], bool]
    ) -> None:
        self._visual, self._decoder = visual, decoder.options(stream=True)
        self._both_run, self._is_ready = both_run, False
        self._watch: asyncio.Task[None] | None = None

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        told = said = False
        try:
            async with aclosing(self._once(asked)) as events:
                async for event in events:
                    told, said = True, said or isinstance(event, str)
                    yield event
            return
        except _Lost:
            if said:  # half an answer cannot be taken back
                raise
        async with aclosing(self._once(asked)) as events:
            async for event in events:
                if not (told and isinstance(event, list)):
                    yield event

    async def _once(self, asked: Asked) -> AsyncGenerator[Event, None]:
        under_way: Any = None
        try:
            under_way = self._visual.select.remote((asked.request, asked.pruning))
            selected = await under_way
            if isinstance(selected, Exception):
                raise selected
            images, before_ms = selected
            under_way = self._decoder.answer.remote(replace(asked, request=_with_selected(asked.request, images)))
            async for event in under_way:
                yield _with_times(event, before_ms) if isinstance(event, Done) else event
        except (asyncio.CancelledError, GeneratorExit):  # nobody reads on
            with suppress(Exception):  # with which it has ended meanwhile, and which Ray raises here
                under_way.cancel()
            raise
        except _LOSSES:
            raise _Lost from None
        except BackPressureError:
            message = "too many requests are waiting"
            raise ApiError(503, message, code="overloaded", kind="server_error", headers=LATER) from None
        except RayTaskError as error:  # the replica's own error is inside
            raise (_Lost() if isinstance(error.cause, _LOSSES) else error.cause) from None

    def is_ready(self) -> bool:
        """Whether both kinds had a running replica a moment ago; the first question only begins to look."""
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._look())
        return self._is_ready

    async def _look(self) -> None:
        while True:
            try:
                self._is_ready = await asyncio.to_thread(self._both_run)
            except Exception as error:  # Ray's controller is being replaced; replicas answer without it
                log.warning("the state of the replicas is not known: %s", error)
            await asyncio.sleep(_READY_PERIOD_S)

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
