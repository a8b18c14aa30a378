"""The Ray Serve application: its parts without Ray, then on a local Ray, of which replicas are killed under load."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="needs the extra ray")
openai = pytest.importorskip("openai", reason="the tests of the server ask with OpenAI's client")
psutil = pytest.importorskip("psutil", reason="finds the replicas' processes")

import ray
from helpers.serving import png, user
from ray import exceptions as of_ray
from ray.serve import exceptions as of_serve

from flashvlm_export.errors import BudgetError, BundleError, ConfigError, ImageError
from flashvlm_export.runtime.layout import ImageLayout
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Exchange, Pruning, Request, SelectedImage
from flashvlm_export.runtime.server import ray_app
from flashvlm_export.runtime.server.answering import Done, Event, KeptTokens
from flashvlm_export.runtime.server.api_errors import ApiError
from flashvlm_export.runtime.server.conversation import Asked
from flashvlm_export.runtime.server.ray_app import ClusterSettings, app

WAIT_S = 120.0
CLIENTS = 8
QUESTIONS = 24


KEPT = KeptTokens([(4, 4)], [0, 3])
ASKED = Asked(Request([png(1)], "What?"), Pruning(2), SamplingParams(4), [])


@dataclass
class Call:
    """What a call of a replica gives: its result, or several where it streams; then it raises, or hangs."""

    results: Sequence[Any] = ()
    error: Exception | None = None
    hangs: bool = False
    cancelled: bool = False

    def __await__(self) -> Generator[Any, None, Any]:
        return anext(aiter(self)).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for each in self.results:
            yield each
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled = True
        if self.error is not None:  # as Ray's own does
            raise self.error


@dataclass
class Handle:
    """A deployment's handle, of which each call gives the next of ``calls``."""

    calls: Sequence[Call]
    asked: list[Any] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name not in ("select", "answer"):
            raise AttributeError(name)
        return self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, asked: Any) -> Call:
        self.asked.append(asked)
        return self.calls[len(self.asked) - 1]


def selected() -> Call:
    scores = np.zeros(16, np.float32)
    places = np.array([0, 3])
    image = SelectedImage(np.zeros((2, 4), np.float32), places, places, scores, ImageLayout(((4, 4),)))
    return Call([([image], {"encode": 3.0, "prepare": 1.0})])


def finished(**stage_ms: float) -> Done:
    return Done("stop", 9, 2, 16, 2, stage_ms)


def answered(visual: Handle, decoder: Handle) -> list[Event]:
    answerer = ray_app._ClusterAnswerer(visual, decoder, lambda: True)

    async def collect() -> list[Event]:
        return [each async for each in answerer.answer(ASKED)]

    return asyncio.run(collect())


LOSSES = [
    of_ray.RayActorError(),
    of_ray.NodeDiedError("gone"),
    of_ray.WorkerCrashedError(),
    of_ray.ObjectLostError("00", None, ""),
    of_ray.OwnerDiedError("00", None, ""),
    of_ray.RayTaskError("answer", "Traceback", of_ray.NodeDiedError("gone")),
    *(getattr(of_serve, name)("gone") for name in ray_app._LATER_LOSSES if hasattr(of_serve, name)),
]


@pytest.mark.parametrize("lost", LOSSES, ids=lambda lost: type(lost).__name__)
def test_what_is_lost_before_any_text_is_asked_once_more(lost: Exception) -> None:
    visual = Handle([Call(error=lost), selected()])
    assert answered(visual, Handle([Call([[KEPT], finished()])])) == [[KEPT], finished(encode=3.0, prepare=1.0)]

    decoder = Handle([Call([[KEPT]], lost), Call([[KEPT], "Noise", ".", finished()])])
    told, *texts, done = answered(Handle([selected(), selected()]), decoder)
    assert (told, texts) == ([KEPT], ["Noise", "."]), "what is kept is told once"
    assert isinstance(done, Done)

    twice = Handle([Call(error=lost), Call(error=lost)])
    with pytest.raises(ApiError) as caught:
        answered(twice, Handle([]))
    assert (caught.value.status, code_of(caught.value)) == (503, "replica_lost")
    assert len(twice.asked) == 2


def code_of(error: ApiError) -> str:
    return error.body["error"]["code"]


def test_an_answer_that_has_begun_is_not_asked_again() -> None:
    decoder = Handle([Call([[KEPT], "Noi"], of_ray.RayActorError())])
    with pytest.raises(ApiError) as caught:
        answered(Handle([selected()]), decoder)
    assert code_of(caught.value) == "replica_lost"


def test_times_of_both_replicas_are_added() -> None:
    decoder = Handle([Call([[KEPT], finished(prepare=2.0, decode=4.0)])])
    done = answered(Handle([selected()]), decoder)[-1]
    assert isinstance(done, Done)
    assert done.stage_ms == {"encode": 3.0, "prepare": 3.0, "decode": 4.0}
    assert [type(each) for each in decoder.asked[0].request.images] == [SelectedImage]


def test_a_full_queue_is_an_overload() -> None:
    full = Call(error=of_serve.BackPressureError(2, 2))
    for visual, decoder in ((Handle([full]), Handle([])), (Handle([selected()]), Handle([full]))):
        with pytest.raises(ApiError) as caught:
            answered(visual, decoder)
        assert (caught.value.status, code_of(caught.value)) == (503, "overloaded")
        assert caught.value.headers == {"Retry-After": "1"}


def test_errors_of_replicas_come_out_as_they_were() -> None:
    for mistake in (ImageError("this is none"), ValueError("of a driver")):
        returned = Call([mistake])
        crossed = Call(error=of_ray.RayTaskError("answer", "Traceback", mistake).as_instanceof_cause())
        for visual, decoder in (
            (Handle([returned]), Handle([])),
            (Handle([crossed]), Handle([])),
            (Handle([selected()]), Handle([crossed])),
        ):
            with pytest.raises(type(mistake)) as caught:
                answered(visual, decoder)
            assert caught.value is mistake


@pytest.mark.parametrize("results", [[], [[KEPT]], [[KEPT], "Noise"]], ids=len)
@pytest.mark.parametrize("while_waiting", [True, False])
def test_who_leaves_frees_the_replica_that_works(results: list[Event], while_waiting: bool) -> None:
    async def leave(visual: Handle, decoder: Handle) -> None:
        answerer = ray_app._ClusterAnswerer(visual, decoder, lambda: True)
        async with aclosing(answerer.answer(ASKED)) as events:
            for each in results:
                assert await anext(events) == each
            if while_waiting or not results:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(anext(events), 0.01)
        assert works.cancelled

    works = Call(results, hangs=True)
    asyncio.run(leave(Handle([selected()]), Handle([works])))
    if not results:
        works = Call(hangs=True)
        asyncio.run(leave(Handle([works]), Handle([])))


def test_ready_is_what_was_last_seen_and_looking_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_app, "_READY_PERIOD_S", 0.01)
    state: list[bool | Exception] = [True]
    may_look = threading.Event()

    def look() -> bool:
        assert may_look.wait(2)
        if isinstance(state[0], Exception):
            raise state[0]
        return state[0]

    async def watch() -> None:
        answerer = ray_app._ClusterAnswerer(Handle([]), Handle([]), look)
        start = time.monotonic()
        assert not answerer.is_ready(), "nothing has been seen yet"
        await asyncio.sleep(0.05)
        assert not answerer.is_ready(), "nor has it by now"
        assert time.monotonic() - start < 2, "who looks blocks nobody"
        may_look.set()
        for expected in (True, False, True):
            await seen_by(answerer, expected)
        state[0] = RuntimeError("the controller is being replaced")
        await asyncio.sleep(0.05)
        assert answerer.is_ready()
        await seen_by(answerer, False)

    async def seen_by(answerer: ray_app._ClusterAnswerer, expected: bool) -> None:
        state[0] = expected
        deadline = time.monotonic() + WAIT_S
        while answerer.is_ready() != expected:
            assert time.monotonic() < deadline, expected
            await asyncio.sleep(0.01)

    asyncio.run(watch())


def test_replicas_are_what_the_settings_say(tiny_bundle: Path) -> None:
    sized = {"visual_gpus": 0.5, "decoder_gpus": 2, "replica_cpus": 3, "visual_replicas": 4, "ingress_replicas": 2}
    busy = {"most_decoder_replicas": 6, "max_queue": 5, "max_answers": 3, "visual_batch": 16, "max_seconds": 7}
    ingress, visual, decoder = deployments(app({"bundle": str(tiny_bundle), **sized, **busy}))
    assert not ray.is_initialized()
    assert (visual.name, visual.num_replicas, visual.max_ongoing_requests) == ("Visual", 4, 32)
    assert visual.ray_actor_options.items() >= {"num_cpus": 3, "num_gpus": 0.5}.items()
    assert decoder.ray_actor_options.items() >= {"num_cpus": 3, "num_gpus": 2}.items()
    scaling = decoder._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 6, 3)
    assert decoder.max_ongoing_requests == 3
    assert (ingress.num_replicas, ingress.ray_actor_options["num_cpus"]) == (2, 0)
    assert ingress.max_ongoing_requests == 2 * (4 * 32 + 6 * 3 + 2 * 5)
    assert [each.max_queued_requests for each in (ingress, visual, decoder)] == [ingress.max_ongoing_requests, 5, 5]
    assert {each._deployment_config.graceful_shutdown_timeout_s for each in (ingress, visual, decoder)} == {7}

    _, visual, decoder = deployments(app({"bundle": str(tiny_bundle), "most_visual_replicas": 2, "visual_batch": 16}))
    assert visual._deployment_config.autoscaling_config.target_ongoing_requests == 16
    assert (decoder.num_replicas, decoder.max_ongoing_requests) == (1, 8)


def deployments(application: Any) -> list[Any]:
    """The ingress and what is bound to it; Ray keeps them to itself."""
    ingress = application._bound_deployment
    return [ingress, *(each._bound_deployment for each in ingress.init_args)]


def test_one_of_a_batch_that_fails_does_so_alone(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visual = ray_app._Visual(ClusterSettings(bundle=tiny_bundle, precision="fp32", threads=1))
    with visual._vlm as vlm:
        asked = [(Request([png(seed)], f"Question {seed}?"), Pruning(3 + seed)) for seed in range(4)]
        encode_each = vlm.encode_each

        def fail(some: Sequence[tuple[Request, Pruning]]) -> Any:
            if any(request is asked[1][0] for request, _ in some):
                raise ValueError("of a driver")
            return encode_each(some)

        monkeypatch.setattr(vlm, "encode_each", fail)
        wrong = (Request([b"no picture"], "What?"), Pruning(3))
        found = visual._select([*asked, wrong])
        kept = [len(each[0][0].indices) if isinstance(each, tuple) else type(each) for each in found]
        assert kept == [3, ValueError, 5, 6, ImageError]


def test_what_comes_while_others_are_encoded_is_encoded_together(tiny_bundle: Path) -> None:
    settings = ClusterSettings(bundle=tiny_bundle, precision="fp32", threads=1, visual_batch=3, max_wait_ms=0)
    visual = ray_app._Visual(settings)
    batches: list[list[int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def hold(asked: Sequence[int]) -> list[int]:
        batches.append(list(asked))
        begun.set()
        assert go_on.wait(WAIT_S)
        return [-each for each in asked]

    async def ask() -> None:
        first = asyncio.create_task(visual.select(0))
        await asyncio.to_thread(begun.wait)
        others = [asyncio.create_task(visual.select(number)) for number in range(1, 6)]
        await asyncio.sleep(0.05)
        others[1].cancel()
        await asyncio.sleep(0)
        go_on.set()
        assert await first == 0
        found = await asyncio.gather(*others, return_exceptions=True)
        assert [type(one) if isinstance(one, BaseException) else one for one in found] == [
            *(-1, asyncio.CancelledError, -3, -4, -5)
        ]
        assert await asyncio.wait_for(visual.select(6), WAIT_S) == -6, "it begins again"

    with visual._vlm:
        visual._select = hold
        asyncio.run(ask())
    assert batches == [[0], [1, 3], [4, 5], [6]]


def test_a_decoder_gives_up_at_once_what_nobody_reads() -> None:
    class Answers:
        given_up = False

        async def answer(self, asked: Asked) -> AsyncIterator[Event]:
            try:
                yield [KEPT]
            finally:
                self.given_up = True

    async def leave() -> None:
        async with aclosing(decoder.answer(ASKED)) as events:
            await anext(events)
        assert answers.given_up

    decoder, answers = object.__new__(ray_app._Decoder), Answers()
    decoder._answerer = answers
    asyncio.run(leave())


def test_a_decoder_whose_service_broke_down_is_not_healthy(tiny_bundle: Path) -> None:
    decoder = ray_app._Decoder(ClusterSettings(bundle=tiny_bundle, precision="fp32", threads=1))
    decoder.check_health()
    decoder._answerer._service.close()
    with pytest.raises(RuntimeError, match="broken down"):
        decoder.check_health()


@dataclass
class Cluster:
    """What Ray's own command has started: ``url`` has two replicas of each kind, ``{url}/small`` takes little."""

    url: str
    process: subprocess.Popen[bytes]

    def replicas(self, kind: str, application: str = "flashvlm") -> list[int]:
        """Process ids of the replicas of one kind; of this cluster, and of no other on this machine."""
        title = f"ray::ServeReplica:{application}:{kind}"
        started = psutil.Process(self.process.pid).children(recursive=True)
        return [each.pid for each in started if title in " ".join(cmdline(each))]


@pytest.fixture(scope="module")
def cluster(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (directory / "serve.yaml").write_text(
        f"""
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: flashvlm
    route_prefix: /
    import_path: flashvlm_export.runtime.server.ray_app:app
    args: {{bundle: "{tiny_bundle}", precision: fp32, threads: 1, name: tiny, visual_replicas: 2, decoder_replicas: 2,
            replica_cpus: 0.1}}
  - name: small
    route_prefix: /small
    import_path: flashvlm_export.runtime.server.ray_app:app
    args: {{bundle: "{tiny_bundle}", precision: fp32, threads: 1, name: tiny, max_queue: 2, max_answers: 1,
            replica_cpus: 0.1}}
"""
    )
    command = [str(Path(sys.executable).parent / "serve"), "run", str(directory / "serve.yaml")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        started = Cluster(f"http://127.0.0.1:{port}", process)
        for url in (started.url, f"{started.url}/small"):
            wait_until_ready(url, process, directory / "log")
        yield started
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(WAIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/ready") as response:
                if response.status == 200:
                    return
        except OSError:  # nobody listens, or has an application, yet
            time.sleep(0.2)
    pytest.fail(log.read_text())


def cmdline(process: Any) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ended meanwhile
        return []


def question(seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What client ``seed`` asks: every other one as a second question about its picture."""
    asked = [user(f"Question {seed}?", png(seed % 6))]
    if seed % 2:
        asked = [
            user("What is it?", png(seed % 6)),
            {"role": "assistant", "content": "Noise."},
            user(f"Question {seed}?"),
        ]
    return asked, {"token_budget": (3, 9, "full")[seed % 3], "selector": (None, "divprune")[seed // 3 % 2]}


def test_answers_are_those_of_one_pipeline_while_replicas_are_killed(cluster: Cluster, tiny_bundle: Path) -> None:
    expected = []
    with Pipeline.open(tiny_bundle, precision="fp32", threads=1, selectors=["flashvlm", "divprune"]) as vlm:
        for seed in range(QUESTIONS):
            _, extra = question(seed)
            budget = 16 if extra["token_budget"] == "full" else extra["token_budget"]
            history = [Exchange([png(seed % 6)], "What is it?", "Noise.")] if seed % 2 else []
            request = Request([] if history else [png(seed % 6)], f"Question {seed}?", history=history)
            prompt = vlm.encode_each([(request, Pruning(budget, selector=extra["selector"]))])[0]
            expected.append(vlm.answer(prompt, SamplingParams(12)).text)
    assert len(set(expected)) > QUESTIONS / 2, "dull answers would match anything"
    assert [len(cluster.replicas(kind)) for kind in ("Visual", "Decoder", "Ingress")] == [2, 2, 1]

    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
    answered, stop, lost = threading.Semaphore(0), threading.Event(), []

    def ask(seed: int) -> None:
        messages, extra = question(seed)
        options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 12, "extra_body": extra}
        text = ""
        try:
            if seed % 3:
                text = client.chat.completions.create(**options).choices[0].message.content
            else:
                for chunk in client.chat.completions.create(stream=True, **options):
                    text += chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            assert text or seed % 3, "of what is streamed the text had begun"
            lost.append(error)
        else:
            assert text == expected[seed]
            answered.release()

    def ask_on(first: int) -> None:
        seed = first
        while not stop.is_set():
            ask(seed % QUESTIONS)
            seed += CLIENTS

    with ThreadPoolExecutor(CLIENTS) as clients:
        running = [clients.submit(ask_on, number) for number in range(CLIENTS)]
        try:
            for kind in ("Visual", "Decoder"):
                for _ in range(2 * CLIENTS):
                    assert answered.acquire(timeout=WAIT_S)
                assert lost == [], "no answer begins while images are encoded"
                os.kill(cluster.replicas(kind)[0], signal.SIGKILL)
            for _ in range(4 * CLIENTS):
                assert answered.acquire(timeout=WAIT_S)
        finally:
            stop.set()
        for each in running:
            each.result(WAIT_S)

    # What was in flight at a killed replica was asked again, unless its answer had begun.
    assert len(lost) <= CLIENTS
    assert {(error.body or {}).get("code") for error in lost} <= {"replica_lost"}
    deadline = time.monotonic() + WAIT_S
    while [len(cluster.replicas(kind)) for kind in ("Visual", "Decoder")] != [2, 2]:
        assert time.monotonic() < deadline, "the killed replicas were not replaced"
        time.sleep(0.2)
    for seed in range(QUESTIONS):
        ask(seed)


def test_mistakes_cross_the_cluster_in_openais_shape(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
    for extra, code in (({"token_budget": 17}, "invalid_value"), ({"max_tokens": 1020}, "context_length_exceeded")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[user("What?", png(1))], extra_body=extra)
        assert caught.value.body["code"] == code
    assert client.models.list().data[0].id == "tiny"


def test_any_name_leads_to_a_cluster_that_has_not_been_given_some(cluster: Cluster) -> None:
    request = urllib.request.Request(f"{cluster.url}/v1/models", headers={"Host": "models.example.org"})
    with urllib.request.urlopen(request) as response:
        assert response.status == 200


def test_one_request_too_many_is_refused_at_once(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/small/v1", api_key="none", max_retries=0, timeout=WAIT_S)

    def ask(number: int) -> openai.APIStatusError | None:
        question = [user(f"Question {number}?", png(number % 6))]
        try:
            client.chat.completions.create(model="tiny", messages=question, max_tokens=64)
        except openai.APIStatusError as error:
            return error
        return None

    with ThreadPoolExecutor(40) as clients:
        errors = [error for error in clients.map(ask, range(40)) if error is not None]
    assert 0 < len(errors) < 40
    assert {(error.status_code, error.body["code"]) for error in errors} == {(503, "overloaded")}
    assert {error.response.headers["retry-after"] for error in errors} == {"1"}
    assert ask(0) is None


@pytest.mark.parametrize("kind", ["Visual", "Decoder"])
def test_not_ready_while_a_kind_has_no_replica(cluster: Cluster, kind: str) -> None:
    [only] = cluster.replicas(kind, "small")
    os.kill(only, signal.SIGKILL)
    for expected in (503, 200):
        deadline = time.monotonic() + WAIT_S
        while status_of(f"{cluster.url}/small/ready") != expected:
            assert time.monotonic() < deadline, expected
            time.sleep(0.05)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_settings_are_those_of_the_server(tiny_bundle: Path) -> None:
    typed = ClusterSettings.of({"bundle": "b", "visual_replicas": "3", "selectors": "a,b", "decoder_gpus": "0.5"})
    assert typed == ClusterSettings(bundle=Path("b"), visual_replicas=3, selectors=("a", "b"), decoder_gpus=0.5)
    fewer = {"decoder_replicas": "3", "most_decoder_replicas": "2"}
    for wrong in ({"visual_replicas": "0"}, {"visual_replicsa": "1"}, {"decoder_gpus": "-1"}, fewer):
        with pytest.raises(ConfigError, match="cannot be set up so"):
            app({"bundle": str(tiny_bundle), **wrong})
    with pytest.raises(ConfigError, match="Ray's"):
        app({"bundle": str(tiny_bundle), "port": "9000"})
    with pytest.raises(BudgetError, match="17"):
        app({"bundle": str(tiny_bundle), "token_budget": "17"})
    with pytest.raises(BundleError, match="no bundle at this path"):
        app({"bundle": "/none"})
