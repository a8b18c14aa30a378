"""The Ray Serve application on a local Ray, with two replicas of each kind, of which some are killed under load."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs the extra ray")
openai = pytest.importorskip("openai", reason="the tests of the server ask with OpenAI's client")
psutil = pytest.importorskip("psutil", reason="finds the replicas' processes")

from helpers.serving import png, user

from flashvlm_export.errors import BundleError, ConfigError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Exchange, Pruning, Request
from flashvlm_export.runtime.server.ray_app import ClusterSettings, app

WAIT_S = 120.0
CLIENTS = 8
QUESTIONS = 24


@pytest.fixture(scope="module")
def cluster(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster that Ray's own command started from a file."""
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
"""
    )
    command = [str(Path(sys.executable).parent / "serve"), "run", str(directory / "serve.yaml")]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, directory / "log")
        yield f"http://127.0.0.1:{port}"
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


def replicas(kind: str) -> list[int]:
    """Process ids of the replicas of one kind."""
    title = f"ray::ServeReplica:flashvlm:{kind}"
    return [each.pid for each in psutil.process_iter() if each.is_running() and title in " ".join(cmdline(each))]


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


def test_answers_are_those_of_one_pipeline_while_replicas_are_killed(cluster: str, tiny_bundle: Path) -> None:
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
    assert [len(replicas(kind)) for kind in ("Visual", "Decoder", "Ingress")] == [2, 2, 1]

    client = openai.OpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
    answered, stop, lost = threading.Semaphore(0), threading.Event(), []

    def ask(seed: int) -> None:
        messages, extra = question(seed)
        options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 12, "extra_body": extra}
        try:
            if seed % 3:
                text = client.chat.completions.create(**options).choices[0].message.content
            else:
                chunks = client.chat.completions.create(stream=True, **options)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        except openai.APIError as error:
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
                os.kill(replicas(kind)[0], signal.SIGKILL)
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
    while [len(replicas(kind)) for kind in ("Visual", "Decoder")] != [2, 2]:
        assert time.monotonic() < deadline, "the killed replicas were not replaced"
        time.sleep(0.2)
    for seed in range(QUESTIONS):
        ask(seed)


def test_mistakes_cross_the_cluster_in_openais_shape(cluster: str) -> None:
    client = openai.OpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
    for extra, code in (({"token_budget": 17}, "invalid_value"), ({"max_tokens": 1020}, "context_length_exceeded")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[user("What?", png(1))], extra_body=extra)
        assert caught.value.body["code"] == code
    assert client.models.list().data[0].id == "tiny"


def test_settings_are_those_of_the_server(tiny_bundle: Path) -> None:
    typed = ClusterSettings.of({"bundle": "b", "visual_replicas": "3", "selectors": "a,b", "decoder_gpus": "0.5"})
    assert typed == ClusterSettings(bundle=Path("b"), visual_replicas=3, selectors=("a", "b"), decoder_gpus=0.5)
    for wrong in ({"visual_replicas": "0"}, {"visual_replicsa": "1"}, {"decoder_gpus": "-1"}):
        with pytest.raises(ConfigError, match="cannot be set up so"):
            app({"bundle": str(tiny_bundle), **wrong})
    with pytest.raises(ConfigError, match="Ray's"):
        app({"bundle": str(tiny_bundle), "port": "9000"})
    with pytest.raises(BundleError, match="no bundle at this path"):
        app({"bundle": "/none"})
