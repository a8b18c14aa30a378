"""The command as users type it: answers, figures, the page, mistakes, and what Ctrl-C leaves."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.cli import live as cli_live
from flashvlm_export.cli import main
from flashvlm_export.runtime.live import watch as watch_module
from flashvlm_export.runtime.live.watch import Report, Standing, Statistics
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.request import Pruning

pytest.importorskip("av", reason="reading videos needs PyAV")
import av
from helpers.clips import frame, write_video

WAIT_S = 60.0


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, half a second of it."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, [frame(n, (64, 48)) for n in range(5)], [n / 10 for n in range(5)])


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_is_answered_and_every_frame_accounted_for(
    tiny_bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "seen.mp4"
    command = [
        "live",
        str(tiny_bundle),
        "--source",
        str(clip),
        "--prompt",
        "What?",
        "--budget",
        "5",
        "--max-tokens",
        "2",
    ]
    assert main([*command, "--output", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ended"], told["error"], told["source"]) == ("source", None, str(clip))
    assert told["received"] == 5
    assert 1 <= told["answered"] == len(told["answers"]) <= 5
    assert told["dropped"] == 5 - told["answered"]
    assert 1 < told["source_fps"] < 100  # 10, on a machine that has nothing else to do
    assert told["answers"][-1]["frame"] == 5  # the last is always asked about: nothing newer comes
    for answer in told["answers"]:
        assert len(answer["kept_indices"]) == answer["kept_tokens"] == 5
        assert answer["visual_tokens"] == 16
        assert answer["new_tokens"] == 2
        assert 0 < answer["latency_ms"] <= 1e3 * told["seconds"]
    latencies = [answer["latency_ms"] for answer in told["answers"]]
    assert told["latency_p50_ms"] == pytest.approx(float(np.median(latencies)))
    assert min(latencies) <= told["latency_p99_ms"] <= max(latencies)
    assert frames_of(output) == told["answered"] + 1
    assert main([*command, "--answers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1 answered" in printed
    assert "latency from capture to answer" in printed


def test_a_window_of_frames(qwen_bundle: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["live", str(qwen_bundle), "--source", str(clip), "--prompt", "What?", "--loop", "--answers", "3"]
    assert main([*command, "--frames", "4", "--max-tokens", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ended"] == "answers"
    one, two, three = (answer["visual_tokens"] for answer in told["answers"])
    # Two frames are a moment, and a single one is shown twice.
    assert one == two
    assert three == 2 * one


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--source", "missing.mp4"], 1, "no such source"),
        (["--source", "97"], 1, "cannot be opened"),
        (["--source", "{clip}", "--prompt", " "], 2, "question is empty"),
        (["--source", "{clip}", "--budget", "17"], 2, "budget"),
        (["--source", "{clip}", "--frames", "4"], 2, "takes no videos"),
        (["--source", "{clip}", "--division", "relevance"], 2, "no moments"),
        (["--source", "{clip}", "--seconds", "0"], 2, "out of range"),
        (["--source", "{clip}", "--size", "64x48"], 2, "no such settings"),
        (["--source", "0", "--size", "wide"], 2, "no size"),
        (["--source", "{clip}", "--output", "out.avi"], 2, ".mp4, .mkv, .png"),
        (["--source", "{clip}", "--output", "nowhere/out.mp4"], 2, "folder does not exist"),
        (["--source", "{clip}", "--api-keys", "keys"], 2, "no page"),
        (["--source", "{clip}", "--port", "99999"], 2, "what --help says"),
        (["--source", "{clip}", "--port", "0", "--api-keys", "nowhere"], 2, "keys cannot be read"),
    ],
)
def test_mistakes_end_in_one_message(
    options: list[str],
    code: int,
    message: str,
    tiny_bundle: Path,
    clip: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--port" in options:
        pytest.importorskip("fastapi", reason="the page needs FastAPI")
    given = [option.replace("{clip}", str(clip)) for option in options]
    command = ["live", str(tiny_bundle), "--prompt", "What?", *given]
    assert main(command) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("flashvlm live: ")
    if code == 2:  # what is wrong with the call is told before anything else
        assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


TOTALS = Statistics(
    seconds=8.0,
    received=70,
    answered=5,
    dropped=65,
    source_fps=9.5,
    answers_per_second=0.625,
    latency_p50_ms=120.0,
    latency_p99_ms=340.0,
    reconnects=2,
)


def test_every_option_reaches_the_question(
    tiny_bundle: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="the page needs FastAPI")
    asked: list[Standing] = []
    served: list[Any] = []

    def answer(vlm: object, source: object, standing: Standing, **more: object) -> Report:
        asked.append(standing)
        return Report("answers", None, TOTALS)

    def show(place: object, settings: Any) -> Any:
        served.append(settings)
        return nullcontext("http://0.0.0.0:9")

    monkeypatch.setattr(watch_module, "watch", answer)
    monkeypatch.setattr("flashvlm_export.runtime.server.live.showing", show)
    options = {
        "--source": str(clip),
        "--prompt": "What?",
        "--system": "Be short.",
        "--budget": "5",
        "--text-span": "question",
        "--positions": "original",
        "--every": "2.5",
        "--answers": "7",
        "--seconds": "60",
        "--max-tokens": "3",
        "--temperature": "0.5",
        "--port": "0",
        "--host": "0.0.0.0",
        "--hosts": "camera.lan,localhost",
    }
    assert main(["live", str(tiny_bundle), *(word for option in options.items() for word in option)]) == 0
    assert asked == [
        Standing(
            "What?",
            "Be short.",
            Pruning(5, "question", "original"),
            SamplingParams(max_new_tokens=3, temperature=0.5),
            every_s=2.5,
            answers=7,
            seconds=60.0,
        )
    ]
    (settings,) = served
    assert (settings.host, settings.port, settings.hosts) == ("0.0.0.0", 0, ("camera.lan", "localhost"))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "anybody who reaches 0.0.0.0 can watch: --api-keys FILE shuts others out",
        "watch at http://0.0.0.0:9/live",
        f"{clip}: What?  (Ctrl-C ends)",
        "  8.0 s: 70 frames received, 9.5 per second; 5 answered, 0.62 per second; 65 dropped; 2 reconnects",
        "  latency from capture to answer: median 120 ms, 99 % within 340 ms",
    ]


def test_json_tells_of_the_newest_answers(
    tiny_bundle: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_live, "_TOLD", 2)
    command = ["live", str(tiny_bundle), "--source", str(clip), "--prompt", "What?", "--loop", "--budget", "5"]
    assert main([*command, "--answers", "3", "--max-tokens", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answered"] == 3
    assert len(told["answers"]) == 2
    assert [len(answer["kept_indices"]) for answer in told["answers"]] == [5, 5]


def test_a_file_that_breaks_tells_its_figures_and_then_fails(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_video(
        tmp_path / "a.avi", [frame(n, (64, 48)) for n in range(90)], [n / 30 for n in range(90)], "mjpeg"
    )
    with av.open(str(whole)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][60]
    content = bytearray(whole.read_bytes())
    content[place + 8 : place + size] = bytes(size - 8)
    whole.write_bytes(content)
    output = tmp_path / "seen.mp4"
    command = ["live", str(tiny_bundle), "--source", str(whole), "--prompt", "What?", "--max-tokens", "1"]
    assert main([*command, "--output", str(output), "--json"]) == 1
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert "frame of the video is broken" in told["error"]
    assert "frame of the video is broken" in captured.err
    assert told["received"] >= told["answered"] > 0
    assert frames_of(output) == told["answered"] + 1


@contextmanager
def running(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """The command in a process of its own, and what it says."""
    command = [sys.executable, "-m", "flashvlm_export", "live", str(bundle), "--prompt", "What?", "--max-tokens", "1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_the_report_and_a_recording(
    number: signal.Signals, tiny_bundle: Path, clip: Path, tmp_path: Path
) -> None:
    output = tmp_path / "seen.mp4"
    options = ["--source", str(clip), "--loop", "--output", str(output), "--json"]
    with running(tiny_bundle, *options) as (process, said):
        answers = (line for line in said if line.rstrip().endswith(" ms)"))
        assert next(answers)
        assert next(answers)  # the picture of the first is in the recording
        process.send_signal(number)
        printed, rest = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    told = json.loads(printed)
    assert told["ended"] == "interrupt"
    assert told["answered"] >= 1
    assert told["received"] == told["answered"] + told["dropped"]
    assert frames_of(output) >= 2
    assert list(tmp_path.iterdir()) == [output]


def test_the_page_shows_answers_to_who_has_the_key(tiny_bundle: Path, clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the page needs FastAPI")
    (tmp_path / "keys").write_text("open-sesame\n")
    options = ["--source", str(clip), "--loop", "--budget", "5", "--port", "0", "--api-keys", str(tmp_path / "keys")]
    with running(tiny_bundle, *options, "--json") as (process, said), ExitStack() as stack:
        port = next(
            int(found[1]) for line in said if (found := re.search(r"watch at http://127.0.0.1:(\d+)/live", line))
        )
        threading.Thread(target=said.read, daemon=True).start()

        def get(path: str, **headers: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
            stack.callback(connection.close)
            connection.request("GET", path, headers=headers)
            return stack.enter_context(connection.getresponse())

        page = get("/live")
        assert page.status == 200
        assert "script-src 'self'" in page.headers["Content-Security-Policy"]
        html = page.read().decode()
        names = re.findall(r'"(page/[^"]+)"', html)
        assert len(names) >= 2
        for name in names:
            assert get(f"/{name}").status == 200
        assert get("/page/index.html", Authorization="Bearer open-sesame").status == 404  # that is another page
        for path in ("/live/events", "/live.mjpg"):
            assert get(path).status == 401
            assert get(path, Host="elsewhere.example", Authorization="Bearer open-sesame").status == 421
        events = get("/live/events", Authorization="Bearer open-sesame")
        assert events.headers["Content-Type"].startswith("text/event-stream")
        answered = []
        while len(answered) < 3:
            line = events.readline().decode()
            if line.startswith("data: "):
                seen = json.loads(line.removeprefix("data: "))
                answered.append(seen["answered"])
                assert seen["kept_tokens"] == 5
        assert answered == sorted(set(answered))  # each is newer than the one before
        picture = Image.open(io.BytesIO(base64.b64decode(seen["picture"].partition(",")[2])))
        assert picture.size[0] >= 480
        stream = get("/live.mjpg", Authorization="Bearer open-sesame")
        assert stream.readline() == b"--frame\r\n"
        assert stream.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(stream.readline().split()[1])
        assert stream.readline() == b"\r\n"
        assert Image.open(io.BytesIO(stream.read(length))).format == "JPEG"
        process.send_signal(signal.SIGINT)
        # A viewer hears that it is over, and holds nothing up.
        assert b'"ended":true' in events.read().splitlines()[-2]
        assert process.wait(WAIT_S) == 0
