"""Clients that must not come in, that are too large, too slow, or leave: what becomes of them, and of the others."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("openai", reason="the tests of the server ask with OpenAI's client")

from helpers.serving import WAIT_S, app_of, png, raw_connection, read_to_end, user

from flashvlm_export.errors import LLMError
from flashvlm_export.runtime.llm.onnxruntime import OnnxRuntimeLLM
from flashvlm_export.runtime.server.answering import Done, Event, KeptTokens, Load
from flashvlm_export.runtime.server.conversation import Asked, Intake
from flashvlm_export.runtime.server.guard import Guard
from flashvlm_export.runtime.server.settings import ServerSettings

NAME = "tiny-llava"
LONG = b"a" * 1000


def body(**options: Any) -> bytes:
    return json.dumps({"model": NAME, "messages": [user("What is it?", png(1))], "max_tokens": 4, **options}).encode()


def post(url: str, content: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of the response to one request."""
    connection = HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=WAIT_S)
    try:
        connection.request(
            "POST", "/v1/chat/completions", content, {"Content-Type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), json.loads(response.read() or b"null")
    finally:
        connection.close()


def get(url: str, path: str, method: str = "GET", host: str = "localhost") -> tuple[int, bytes]:
    """Status and body."""
    address, _, port = url.removeprefix("http://").rpartition(":")
    connection = HTTPConnection(address, int(port), timeout=WAIT_S)
    try:
        connection.request(method, path, headers={"Host": host})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


class Held:
    """An answerer that begins, and goes on when it is let; ``closed`` counts the answers that were given up."""

    def __init__(self, text: str = "x") -> None:
        self.text, self.go_on, self.closed, self.begun, self.ready = text, threading.Event(), 0, 0, True

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        self.begun += 1
        try:
            yield [KeptTokens([(4, 4)], [0, 5])] * len(asked.views)
            while not self.go_on.is_set():
                yield self.text
                await asyncio.sleep(0.01)
            yield Done("stop", 3, 2, 16, 2, {"prefill": 1.0})
        finally:
            self.closed += not self.go_on.is_set()

    def is_ready(self) -> bool:
        return self.ready

    def load(self) -> Load | None:
        return None


def test_keys_let_in(tiny_bundle: Path) -> None:
    with app_of(tiny_bundle, keys=("first", "second"), name=NAME) as (url, _):
        for headers in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "first"},
            {"Authorization": "Basic first"},
        ):
            status, sent, error = post(url, body(), headers)
            assert (status, error["error"]["code"]) == (401, "invalid_api_key")
            assert sent["www-authenticate"] == "Bearer"
        for key in ("first", "second"):
            assert post(url, body(), {"Authorization": f"Bearer {key}"})[0] == 200
        for path, status in (("/health", 200), ("/ready", 200), ("/", 200), ("/page/page.js", 200)):
            assert get(url, path)[0] == status, path
        for path in (
            "/metrics",
            "/v1/models",
            "/openapi.json",
            "/live",
            "//",
            "/page",
            "/page/",
            "/page/x",
            "/health/../metrics",
        ):
            for method in ("GET", "HEAD", "OPTIONS", "POST"):
                assert get(url, path, method)[0] == 401, (method, path)
        with raw_connection(url) as connection:  # a key comes before a body does
            connection.sendall(head(1 << 20))
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"x-content-type-options: nosniff" in answer


def test_other_names_for_this_machine_are_refused(tiny_bundle: Path) -> None:
    """A page whose own name leads to 127.0.0.1 is not to use the visitor's browser to speak to it."""
    with app_of(tiny_bundle, name=NAME) as (url, _):
        port = url.rpartition(":")[2]
        for host in (f"localhost:{port}", "LOCALHOST", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert post(url, body(), {"Host": host})[0] == 200, host
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "10.0.0.1"):
            status, _, error = post(url, body(), {"Host": host})
            assert (status, error["error"]["code"]) == (421, "wrong_host"), host
    with app_of(tiny_bundle, name=NAME, hosts=("Orin.local", "fd00::1")) as (url, _):
        for host in ("orin.local:80", "ORIN.LOCAL", "[fd00::1]:80", "[FD00::1]"):
            assert post(url, body(), {"Host": host})[0] == 200, host
        assert post(url, body(), {"Host": "localhost"})[0] == 421
    with app_of(tiny_bundle, name=NAME, host="127.0.0.2") as (url, _):
        for host in ("127.0.0.2:80", "localhost"):
            assert get(url, "/v1/models", host=host)[0] == 200, host
        assert get(url, "/v1/models", host="evil.example")[0] == 421


def test_below_a_prefix_the_same_paths_are_open() -> None:
    """As behind Ray's proxy, which says where the application is mounted."""

    async def status_of(path: str, prefix: str) -> int:
        statuses: list[int] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status", 0))

        guard = Guard(app, ServerSettings(bundle=Path("b")), ["key"], ["/ready"])
        headers = [(b"host", b"localhost")]
        await guard({"type": "http", "path": path, "root_path": prefix, "headers": headers}, receive, send)
        return statuses[0]

    paths = {("/small/ready", "/small"): 200, ("/small/metrics", "/small"): 401, ("/small/ready", ""): 401}
    paths |= {("/small/small/ready", "/small"): 401, ("/smallready", "/small"): 401, ("/ready", ""): 200}
    assert {given: asyncio.run(status_of(*given)) for given in paths} == paths


def test_a_form_of_another_page_is_not_taken(tiny_bundle: Path) -> None:
    """Without JSON's own content type a browser would send it from anywhere, without asking this server first."""
    with app_of(tiny_bundle, name=NAME) as (url, _):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            status, _, error = post(url, body(), {"Content-Type": kind})
            assert (status, error["error"]["type"]) == (400, "invalid_request_error"), kind
            assert f"Content-Type is {kind}, not application/json" in error["error"]["message"]
        connection = HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=WAIT_S)
        connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.example"})
        response = connection.getresponse()
        assert response.status == 405
        assert not [name for name, _ in response.getheaders() if name.lower().startswith("access-control")]
        connection.close()


def test_answers_name_what_a_browser_may_do(tiny_bundle: Path) -> None:
    with app_of(tiny_bundle, name=NAME) as (url, _):
        status, headers, _ = post(url, body())
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


@pytest.mark.parametrize("chunked", [False, True])
def test_large_requests_are_cut_off(tiny_bundle: Path, chunked: bool) -> None:
    with app_of(tiny_bundle, name=NAME, max_body_mib=1) as (url, _):
        with raw_connection(url) as connection:
            if chunked:
                connection.sendall(head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
                chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
                for _ in range(17):
                    connection.sendall(chunk)
                connection.sendall(b"0\r\n\r\n")
            else:
                connection.sendall(head((1 << 20) + 1) + b" " * ((1 << 20) + 1))
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"request_too_large" in answer
        with raw_connection(url) as connection:  # one that asks before it sends need not send
            connection.sendall(head(1 << 30, "Expect: 100-continue"))
            assert read_to_end(connection).startswith(b"HTTP/1.1 413 ")
        assert post(url, body())[0] == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"model": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"messages": "' + b"\\ud800" * 100 + b'"}',
        json.dumps({"model": NAME, "messages": [user("\ud800"), {"role": "assistant"}, user("b")]}).encode(),
        json.dumps(
            {"model": NAME, "messages": [user("a"), {"role": "assistant", "content": "\ud800"}, user("b")]}
        ).encode(),
    ],
    ids=range(13),
)
def test_malformed_bodies(tiny_bundle: Path, content: bytes) -> None:
    with app_of(tiny_bundle, Held(), name=NAME) as (url, _):
        status, _, error = post(url, content)
        assert status == 400
        assert error["error"]["type"] == "invalid_request_error"
        assert len(error["error"]["message"]) < 2000


def test_what_is_no_http_is_no_matter(tiny_bundle: Path) -> None:
    held = Held()
    held.go_on.set()
    with app_of(tiny_bundle, held, name=NAME) as (url, _):
        for sent in (
            b"\x16\x03\x01\x02\x00",
            b"GET / HTTP/x\r\n\r\n",
            b"nonsense\r\n\r\n",
            b"GET /" + b"a" * 40_000,
        ):
            with raw_connection(url) as connection:
                connection.sendall(sent)
                with suppress(ConnectionResetError):  # closed with something unread
                    assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")
        assert post(url, body())[0] == 200


def test_who_was_refused_does_not_stay(tiny_bundle: Path) -> None:
    """Without a key, a connection is not to be kept busy by what comes behind the refusal."""
    with app_of(tiny_bundle, Held(), keys=("key",), name=NAME) as (url, _):
        for refused in (head(1000), head(1000).replace(b"localhost", b"evil.example")):
            with raw_connection(url) as connection:
                connection.sendall(refused)
                assert read_to_end(connection).startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 421 "))


def test_slow_clients_are_left(tiny_bundle: Path) -> None:
    """One sends its head byte by byte, one its body, one connects and is silent: none of them stays."""
    held = Held()
    held.go_on.set()
    content = body()
    with app_of(tiny_bundle, held, name=NAME, slow_seconds=2) as (url, _):
        with raw_connection(url) as silent, raw_connection(url) as slow_head, raw_connection(url) as slow_body:
            slow_body.sendall(head(len(content)))
            answers: dict[str, bytes] = {}

            def drip(name: str, connection: Any, sent: bytes) -> None:
                with suppress(OSError):  # it was left: what came before counts
                    for byte in sent:
                        connection.sendall(bytes([byte]))
                        time.sleep(0.02)
                try:
                    answers[name] = read_to_end(connection)
                except ConnectionResetError:
                    answers[name] = b"reset"

            slow = [
                threading.Thread(target=drip, args=given)
                for given in (("head", slow_head, head(9, *["X: 1"] * 99)), ("body", slow_body, content))
            ]
            for thread in slow:
                thread.start()
            meanwhile = 0
            while all(thread.is_alive() for thread in slow):
                assert post(url, content)[0] == 200
                meanwhile += 1
            assert meanwhile > 2, "the others do not notice"
            for thread in slow:
                thread.join(WAIT_S)
            with suppress(ConnectionResetError):  # left, too
                assert read_to_end(silent) == b""
        assert answers["head"] in (b"", b"reset")
        assert answers["body"].startswith(b"HTTP/1.1 408 ")
        assert b"request_timeout" in answers["body"]


def test_a_client_that_does_not_read_is_left(tiny_bundle: Path) -> None:
    held = Held("x" * 100_000)
    with app_of(tiny_bundle, held, name=NAME, slow_seconds=0.5) as (url, _), raw_connection(url) as connection:
        content = body(stream=True)
        connection.sendall(head(len(content)) + content)
        wait_for(lambda: held.closed == 1)
        assert metrics(url)['flashvlm_requests_total{outcome="gone"}'] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_worked_for_no_longer(tiny_bundle: Path, stream: bool) -> None:
    held = Held()
    with app_of(tiny_bundle, held, name=NAME) as (url, _):
        content = body(stream=stream)
        with raw_connection(url) as connection:
            connection.sendall(head(len(content)) + content)
            wait_for(lambda: held.begun == 1)
        wait_for(lambda: held.closed == 1)
        wait_for(lambda: metrics(url).get('flashvlm_requests_total{outcome="gone"}') == 1)


def test_the_service_is_free_again_when_a_client_hangs_up(tiny_bundle: Path) -> None:
    with app_of(tiny_bundle, name=NAME, max_answer_tokens=1000, max_answers=1) as (url, service):
        content = body(stream=True, max_tokens=900)
        with raw_connection(url) as connection:
            connection.sendall(head(len(content)) + content)
            sent = b""
            while sent.count(b"data: ") < 4:  # the answer has begun
                sent += connection.recv(1 << 12)
            assert sent.startswith(b"HTTP/1.1 200 ")
            assert service.under_way == 1
        wait_for(lambda: service.under_way == 0)
        wait_for(lambda: service.vlm.llm.last_run is not None)
        assert service.vlm.llm.last_run.finish_reason == "closed", "it did not go on to its end"
        assert post(url, body())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_its_time(tiny_bundle: Path, stream: bool) -> None:
    held = Held()
    with app_of(tiny_bundle, held, name=NAME, max_seconds=0.3) as (url, _):
        content = body(stream=stream)
        with raw_connection(url) as connection:
            connection.sendall(head(len(content), "Connection: close") + content)
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 200 " if stream else b"HTTP/1.1 504 ")
        assert b'"code":"timeout"' in answer
        assert b"[DONE]" not in answer
        assert held.closed == 1
        assert metrics(url)['flashvlm_requests_total{outcome="504"}'] == 1


def test_reading_a_request_has_its_time_too(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a picture that takes long to decode."""
    let_go, begun = threading.Event(), threading.Semaphore(0)

    def held(self: Intake, body: object) -> Asked:
        begun.release()
        assert let_go.wait(WAIT_S)
        raise AssertionError("nobody waits for it")

    monkeypatch.setattr(Intake, "asked", held)
    held_answerer = Held()
    with app_of(tiny_bundle, held_answerer, name=NAME, max_seconds=0.3, max_queue=1) as (url, _):
        try:
            status, headers, error = post(url, body())
            assert (status, error["error"]["code"], headers["x-should-retry"]) == (504, "timeout", "false")
            content = body()
            with raw_connection(url) as connection:
                connection.sendall(head(len(content)) + content)
                assert begun.acquire(timeout=WAIT_S)
                assert begun.acquire(timeout=WAIT_S)
            wait_for(lambda: metrics(url).get('flashvlm_requests_total{outcome="gone"}') == 1)
        finally:
            let_go.set()
    assert held_answerer.begun == 0


def test_so_many_requests_are_read_at_a_time(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two; who hangs up frees no thread that is at work for it."""
    let_go, begun, seen, at_once = threading.Event(), threading.Semaphore(0), [], []
    read = Intake.asked

    def held(self: Intake, body: Any) -> Asked:
        seen.append(self)
        at_once.append(len(seen))
        begun.release()
        assert let_go.wait(WAIT_S)
        seen.remove(self)
        return read(self, body)

    monkeypatch.setattr(Intake, "asked", held)
    answerer = Held()
    answerer.go_on.set()
    content = body()
    with app_of(tiny_bundle, answerer, name=NAME, max_queue=3) as (url, _), ExitStack() as stack:
        stack.callback(let_go.set)

        def ask() -> Any:
            connection = stack.enter_context(raw_connection(url))
            connection.sendall(head(len(content), "Connection: close") + content)
            return connection

        gone = [ask(), ask()]
        for _ in gone:
            assert begun.acquire(timeout=WAIT_S)
        waiting = [ask() for _ in range(3)]
        time.sleep(0.2)  # that they wait does not show anywhere
        answers = [read_to_end(ask()) for _ in range(2)]
        assert [answer[:13] for answer in answers] == [b"HTTP/1.1 503 "] * 2
        assert all(b"overloaded" in answer and b"retry-after: 1" in answer for answer in answers)
        for connection in gone:
            connection.close()
        wait_for(lambda: metrics(url).get('flashvlm_requests_total{outcome="gone"}') == 2)
        assert not begun.acquire(timeout=0.2), "nobody else is read"
        assert read_to_end(ask()).startswith(b"HTTP/1.1 503 "), "as many wait as before"
        let_go.set()
        assert [read_to_end(connection)[:13] for connection in waiting] == [b"HTTP/1.1 200 "] * 3
    assert max(at_once) == 2


def test_bodies_under_way_have_a_limit_together() -> None:
    """Sixteen of the largest size; it holds for those that are being worked on, too."""
    statuses: list[int] = []
    limit, waiting, release = 1 << 20, asyncio.Semaphore(0), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert len((await receive())["body"]) == limit
        waiting.release()
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def request(guard: Guard) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b" " * limit}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status", 0))

        await guard({"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}, receive, send)

    async def ask() -> None:
        guard = Guard(app, ServerSettings(bundle=Path("b"), max_body_mib=1), (), ())
        first = [asyncio.ensure_future(request(guard)) for _ in range(16)]
        for _ in first:
            await waiting.acquire()
        await request(guard)
        assert statuses == [503, 0], "headers and body of one refusal"
        release.set()
        await asyncio.gather(*first)
        await request(guard)

    asyncio.run(ask())
    assert statuses[2:] == [200] * 17


def test_a_language_model_that_fails_is_not_the_clients_fault(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreachable(Held):
        async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
            raise LLMError("the vLLM server cannot be reached", received="http://10.1.2.3:8000")
            yield ""

    with app_of(tiny_bundle, Unreachable(), name=NAME) as (url, _):
        status, _, error = post(url, body())
    assert (status, error["error"]["code"]) == (500, "internal_error")
    assert "10.1.2.3" not in json.dumps(error)
    assert "http://10.1.2.3:8000" in caplog.text


def test_one_more_than_may_wait_is_told_to_come_again(tiny_bundle: Path) -> None:
    with app_of(tiny_bundle, name=NAME, max_answer_tokens=1000, max_answers=1, max_queue=1) as (url, service):
        content = body(stream=True, max_tokens=900)
        with raw_connection(url) as first, raw_connection(url) as second:
            first.sendall(head(len(content)) + content)
            wait_for(lambda: service.under_way == 1)
            second.sendall(head(len(content)) + content)
            wait_for(lambda: service.waiting == 1)
            status, headers, error = post(url, body())
            assert (status, headers["retry-after"]) == (503, "1")
            assert (error["error"]["code"], error["error"]["type"]) == ("overloaded", "server_error")
            shown = metrics(url)
            assert (shown["flashvlm_queue_requests"], shown["flashvlm_running_requests"]) == (1, 1)
        wait_for(lambda: service.under_way == 0)
        assert post(url, body())[0] == 200


def test_positions_that_the_engine_does_not_take_are_the_clients_to_mend(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines in other programs, such as llama.cpp, count positions by themselves."""
    counting = replace(OnnxRuntimeLLM.capabilities, explicit_positions=False)
    monkeypatch.setattr(OnnxRuntimeLLM, "capabilities", counting)
    with app_of(tiny_bundle, name=NAME) as (url, _):
        status, _, error = post(url, body(token_budget=3, positions="original"))
        assert (status, error["error"]["code"]) == (400, "invalid_value")
        assert "counts positions by itself" in error["error"]["message"]
        assert post(url, body(token_budget=3, positions="contiguous"))[0] == 200


def test_errors_of_other_routes_have_openais_shape(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Held):
        def is_ready(self) -> bool:
            raise RuntimeError("a secret path")

    with app_of(tiny_bundle, Broken(), name=NAME) as (url, _):
        for path, method, expected in (("/none", "GET", 404), ("/health", "POST", 405), ("/page/none", "GET", 404)):
            status, content = get(url, path, method)
            assert (status, json.loads(content)["error"]["type"]) == (expected, "invalid_request_error")
            assert f"{method} {path}" in json.loads(content)["error"]["message"]
        status, content = get(url, "/ready")
        assert (status, json.loads(content)["error"]["code"]) == (500, "internal_error")
        assert b"secret" not in content
    assert "a secret path" in capfd.readouterr().err, "the log has it"


def test_a_defect_shows_nothing_of_itself(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Held):
        async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
            if asked.request.question == "At once?":
                raise RuntimeError("a secret path")
            yield [KeptTokens([(4, 4)], [0])]
            yield "text"
            raise RuntimeError("a secret path")

    with app_of(tiny_bundle, Broken(), name=NAME) as (url, _):
        status, _, error = post(url, body(messages=[user("At once?", png(1))]))
        assert (status, error["error"]["code"]) == (500, "internal_error")
        content = body(stream=True)
        with raw_connection(url) as connection:
            connection.sendall(head(len(content), "Connection: close") + content)
            answer = read_to_end(connection)
        assert b'"code":"internal_error"' in answer
        assert b"secret" not in answer + json.dumps(error).encode()
        assert "a secret path" in caplog.text, "the log has it"


def test_ready_is_what_the_model_is(tiny_bundle: Path) -> None:
    held = Held()
    with app_of(tiny_bundle, held, name=NAME) as (url, _):
        with urllib.request.urlopen(f"{url}/ready") as response:
            assert json.load(response) == {"status": "ready"}
        held.ready = False
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/ready")
        with urllib.request.urlopen(f"{url}/health") as response:
            assert response.status == 200


def test_a_service_that_has_ended_is_not_ready(tiny_bundle: Path) -> None:
    with app_of(tiny_bundle, name=NAME, max_answers=1) as (url, service):
        content = body(stream=True, max_tokens=900)
        with raw_connection(url) as connection:
            connection.sendall(head(len(content), "Connection: close") + content)
            wait_for(lambda: service.under_way == 1)
            service.close(finish=False)
            assert b'"code":"not_ready"' in read_to_end(connection)
        status, _, error = post(url, body())
        assert (status, error["error"]["code"]) == (503, "not_ready")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/ready")


def test_metrics_count_what_was_asked(tiny_bundle: Path) -> None:
    with app_of(tiny_bundle, name=NAME) as (url, _):
        answers = [post(url, body(token_budget=budget))[2] for budget in (3, 5, "full")]
        post(url, b"{")
        post(url, body(), {"Host": "evil.example"})
        for path, host in (("/favicon.ico", "localhost"), ("/v1/models", "evil.example")):  # of no question
            assert get(url, path, host=host)[0] in (404, 421)
        shown = metrics(url)
    assert {name for name in shown if name.startswith("flashvlm_requests_total")} == {
        f'flashvlm_requests_total{{outcome="{outcome}"}}' for outcome in (200, 400, 421)
    }
    assert shown['flashvlm_requests_total{outcome="200"}'] == 3
    assert shown['flashvlm_requests_total{outcome="400"}'] == 1
    assert shown['flashvlm_requests_total{outcome="421"}'] == 1
    assert shown["flashvlm_visual_tokens_total"] == 48
    assert shown["flashvlm_kept_tokens_total"] == 24
    assert shown["flashvlm_answer_tokens_total"] == sum(each["usage"]["completion_tokens"] for each in answers)
    assert shown["flashvlm_batch_size_count"] == shown['flashvlm_batch_size_bucket{le="1"}'] == 3
    assert (shown["flashvlm_image_cache_misses_total"], shown["flashvlm_image_cache_hits_total"]) == (1, 2)
    assert shown["flashvlm_time_to_first_token_seconds_count"] == 3
    prefill_s = sum(each["flashvlm"]["stage_ms"]["prefill"] for each in answers) / 1e3
    assert shown['flashvlm_stage_seconds_sum{stage="prefill"}'] == pytest.approx(prefill_s)
    assert shown['flashvlm_stage_seconds_count{stage="encode"}'] == 1
    assert shown["process_resident_memory_bytes"] > 0
