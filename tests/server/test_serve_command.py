"""The command: its options and file, its signals, and how it fails."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("openai", reason="the tests of the server ask with OpenAI's client")

from helpers.serving import WAIT_S, Process, png, serving, user

from flashvlm_export.cli import build_parser, main
from flashvlm_export.errors import ConfigError
from flashvlm_export.runtime.server import listening
from flashvlm_export.runtime.server.settings import ServerSettings


def body(**options: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [user("What is it?", png(1))], **options}).encode()


def open_stream(served: Process, content: bytes) -> tuple[HTTPConnection, Any]:
    connection = HTTPConnection("127.0.0.1", served.port, timeout=WAIT_S)
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def wait_until_refused(served: Process) -> None:
    """Return when the server takes no new connection."""
    deadline = time.monotonic() + WAIT_S
    while is_taken(served.port):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_taken(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish(tiny_bundle: Path, number: int) -> None:
    with serving(tiny_bundle, "--name", "tiny", "--threads", "1") as served:
        alone, response = open_stream(served, body(max_tokens=400))
        expected = json.loads(response.read())["choices"][0]["message"]["content"]
        alone.close()
        connection, response = open_stream(served, body(stream=True, max_tokens=400))
        first = response.readline()
        assert b'"role":"assistant"' in first
        codes: list[int] = []
        stopper = threading.Thread(target=lambda: codes.append(served.stop(number)))
        stopper.start()
        wait_until_refused(served)
        assert stopper.is_alive(), "what runs is not finished yet"
        rest = response.read()
        connection.close()
        stopper.join(WAIT_S)
    assert rest.endswith(b"data: [DONE]\n\n")
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in rest.splitlines()[:-2] if line]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert len(chunks) > 50
    assert codes == [0]
    assert served.lines[-1] == "finished what was running; no longer listening\n"


def test_a_second_interrupt_does_not_wait(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--name", "tiny", "--threads", "1", "--max-answer-tokens", "1000") as served:
        connection, response = open_stream(served, body(stream=True, max_tokens=950))
        response.readline()
        served.process.send_signal(signal.SIGINT)
        wait_until_refused(served)
        assert served.stop(signal.SIGINT) == 0
        connection.close()


def test_a_file_and_options_are_one_configuration(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'bundle = "there"\nmax_queue = 3\nselectors = ["flashvlm", "divprune"]\nslow_seconds = 5\nport = 1234\n'
        f'api_keys = "{tmp_path}/keys"\n'
    )
    settings = ServerSettings.of({"port": 99, "max_wait_ms": 1.5}, file)
    assert settings == ServerSettings(
        bundle=Path("there"),
        max_queue=3,
        selectors=("flashvlm", "divprune"),
        slow_seconds=5.0,
        port=99,
        max_wait_ms=1.5,
        api_keys=tmp_path / "keys",
    )
    typed = vars(build_parser().parse_args(["serve", "b", "--selectors", "a, b", "--port", "1", "--cuda-graphs"]))
    given = {name: typed[name] for name in ("bundle", "selectors", "port", "cuda_graphs")}
    assert ServerSettings.of(given) == ServerSettings(bundle=Path("b"), selectors=("a", "b"), port=1, cuda_graphs=True)


def test_every_setting_is_an_option_that_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in ServerSettings.__struct_fields__[1:]:
        assert f"--{name.replace('_', '-')}" in shown
    assert "port to listen at; 0 takes a free one (default: 8000)" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bundle = 1", "expected a path"),
        ('bundle = "b"\nport = 70000', "Expected `int` <= 65535 - at `$.port`"),
        ('bundle = "b"\nmax_answers = 0', "Expected `int` >= 1 - at `$.max_answers`"),
        ('bundle = "b"\nmax_seconds = 0', "Expected `float` > 0.0 - at `$.max_seconds`"),
        ('bundle = "b"\nmax_seconds = inf', "Expected `float` <= 1000000.0 - at `$.max_seconds`"),
        ('bundle = "b"\nprovider = "gpu"', "Invalid enum value 'gpu' - at `$.provider`"),
        ('bundle = "b"\nprot = 1', "unknown field `prot`"),
        ('bundle = "b"\nanswer_tokens = 2000', "answer_tokens 2000 is above max_answer_tokens 1024"),
        ("port = 1", "which bundle to serve is not said"),
        ('bundle = "b"\nimage_hosts = ["http://example.com"]', "a host is a name alone, such as example.com"),
        ('bundle = "b"\nhosts = ["example.com:80"]', "not 'example.com:80'"),
        ("port 1", "not TOML"),
        ("\udcff", "not TOML"),
    ],
)
def test_configurations_that_make_no_sense(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        ServerSettings.of({}, file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["{tmp}/none"], 1, "no such directory"),
        (["{bundle}", "--config", "{tmp}/none.toml"], 2, "the configuration cannot be read"),
        (["{bundle}", "--api-keys", "{tmp}/none"], 2, "the API keys cannot be read"),
        (["{bundle}", "--api-keys", "{tmp}/empty"], 2, "there is no API key"),
        (["{bundle}", "--host", "203.0.113.1"], 2, "cannot listen at this address"),
        (["{bundle}", "--port", "{taken}"], 2, "another --port"),
        (["{bundle}", "--selectors", "nonsense"], 2, "nonsense"),
        (["{bundle}", "--llm", "gpt4"], 2, "gpt4"),
        (["{bundle}", "--engine", "orin-agx"], 1, "engine"),
        (["{bundle}", "--cache-mib", "99999999"], 2, "does not fit into memory"),
        (["{bundle}", "--token-budget", "17"], 2, "token budget"),
    ],
)
def test_mistakes_end_in_one_message(
    options: list[str],
    code: int,
    message: str,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "server_of", lambda *args: pytest.fail("it serves"))
    (tmp_path / "empty").write_text("\n \n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        names = {"tmp": tmp_path, "bundle": tiny_bundle, "taken": other.getsockname()[1]}
        port = [] if "--port" in options else ["--port", "0"]
        assert main(["serve", *(option.format(**names) for option in options), *port]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert "listening" not in shown.out


def test_json_comes_last(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--name", "tiny", "--json") as served:
        shown = "".join(served.lines)
        assert served.stop() == 0
    assert "  model: tiny, 16 visual tokens" in shown
    assert "  name: tiny\n" in shown
    assert "max_queue" not in shown, "nobody changed it"
    assert json.loads(served.lines[-1]) == {
        "verb": "serve",
        "bundle": str(tiny_bundle),
        "model": "tiny",
        "address": served.url,
        "selectors": ["flashvlm", "divprune", "cdpruner"],
    }


def test_keys_may_have_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the kitchen\nfirst\n\n  # of the garden\nsecond # third\n")
    assert listening.read_keys(ServerSettings(bundle=tmp_path, api_keys=file)) == ["first", "second # third"]


def test_lines_of_requests_leave_standard_output_alone(tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "flashvlm_export", "serve", str(tiny_bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--access-log", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.match(r"listening at (\S+),", line)))
        with urllib.request.urlopen(f"{url}/health") as response:
            assert response.status == 200
        process.terminate()
        told, said = process.communicate(timeout=WAIT_S)
    assert json.loads(told)["address"] == url
    assert '"GET /health HTTP/1.1" 200' in said
