"""Sources of frames: files at their pace, streams on loopback that break off, pipelines in another process."""

from __future__ import annotations

import errno
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.errors import ConfigError, DependencyError, FlashVLMError, ImageError, UsageError, VideoError
from flashvlm_export.runtime.live import gstreamer
from flashvlm_export.runtime.live.files import StillPicture, VideoFile
from flashvlm_export.runtime.live.frame import Frame, Source
from flashvlm_export.runtime.live.gstreamer import GStreamer
from flashvlm_export.runtime.live.newest import Newest
from flashvlm_export.runtime.live.receiver import Receiver
from flashvlm_export.runtime.live.sources import size_from, source_from
from flashvlm_export.runtime.live.streams import Stream, without_password

pytest.importorskip("av", reason="reading videos and streams needs PyAV")
import av
from helpers.clips import flat, write_video
from helpers.rtsp_server import rtsp_camera

SOON_S = 20.0


class Time(threading.Event):
    """A clock, and a stop event whose waiting makes time go on at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now_s += timeout
        return self.is_set()


def level(frame: Frame) -> int:
    """Return the grey level of a frame, to the nearest ten."""
    return int(round(float(np.asarray(frame.decode()).mean()) / 10) * 10)


def taken(source: Source, count: int | None = None, stop: threading.Event | None = None) -> list[Frame]:
    with closing(source.frames(stop or threading.Event())) as frames:
        return list(islice(frames, count))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Levels 10 to 50, of which the third is shown for half a second and the others for a tenth."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, [flat(10 * n) for n in range(1, 6)], [0, 0.1, 0.2, 0.7, 0.8])


def test_a_file_keeps_its_pace(clip: Path) -> None:
    time = Time()
    frames = taken(VideoFile(clip, clock=time), stop=time)
    assert [level(frame) for frame in frames] == [10, 20, 30, 40, 50]
    assert [frame.captured_s - 100 for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.7, 0.8])


def test_a_file_begins_again(clip: Path) -> None:
    time = Time()
    frames = taken(VideoFile(clip, loop=True, clock=time), 12, stop=time)
    assert [level(frame) for frame in frames] == [10, 20, 30, 40, 50] * 2 + [10, 20]
    again_s = frames[5].captured_s - frames[4].captured_s
    assert 0 < again_s < 1
    assert frames[6].captured_s - frames[5].captured_s == pytest.approx(0.1)


def test_a_picture_is_shown_again_and_again(tmp_path: Path) -> None:
    flat(50).save(tmp_path / "picture.png")
    time = Time()
    frames = taken(StillPicture(tmp_path / "picture.png", fps=4, clock=time), 3, stop=time)
    assert [level(frame) for frame in frames] == [50] * 3
    assert [frame.captured_s - 100 for frame in frames] == [0, 0.25, 0.5]


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 48))
    picture.paste((255, 255, 255), (0, 0, 32, 48))
    path = write_video(tmp_path / "turned.mp4", [picture] * 2, [0, 0.01], rotation=-90)
    upright = taken(VideoFile(path), 1)[0].decode()
    assert upright.size == (48, 64)
    assert np.asarray(upright)[:24].mean() > 240


def test_broken_files(clip: Path, tmp_path: Path) -> None:
    time = Time()
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(VideoError, match="can be read"):
        taken(VideoFile(tmp_path / "text.mp4"))
    whole = write_video(tmp_path / "whole.avi", [flat(100)] * 20, [n / 10 for n in range(20)], "mjpeg")
    with av.open(str(whole)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][9]
    content = bytearray(whole.read_bytes())
    content[place + 8 : place + size] = bytes(size - 8)
    (tmp_path / "broken.avi").write_bytes(content)
    got: list[Frame] = []
    with pytest.raises(VideoError, match="frame of the video is broken"):
        got.extend(VideoFile(tmp_path / "broken.avi", clock=time).frames(time))
    # Frames that are decoded beside the broken one may or may not come before the error.
    assert len(got) < 20


class All(Newest[Frame]):
    """Notes the level of every frame that is put there, also of those that nobody waits for."""

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        self._levels = levels

    def put(self, value: Frame) -> None:
        self._levels.append(level(value))
        super().put(value)


@contextmanager
def http_camera(
    *parts: bytes, silent: bool = False, certificate: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield an address whose first caller gets the first part, the next one the second, …; then there is nothing."""
    asked: list[str] = []
    left = iter(parts)
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            part = next(left, None)
            if part is None:
                self.send_error(503)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(part)
            if silent:
                self.wfile.flush()
                over.wait(SOON_S)

        def log_message(self, *parts: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: the client may go away at any time."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}/camera?key=secret", asked
        over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two streams: five frames of level 60, and five of level 120."""
    folder = tmp_path_factory.mktemp("parts")
    return [
        write_video(folder / f"{shade}.mkv", [flat(shade)] * 5, [n / 10 for n in range(5)], "mjpeg").read_bytes()
        for shade in (60, 120)
    ]


def test_a_stream_that_breaks_off_is_opened_again(parts: list[bytes]) -> None:
    heard: list[str] = []
    levels: list[int] = []
    with http_camera(*parts) as (address, _):
        source = source_from(address)
        assert "secret" not in source.name
        receiver = Receiver(source, on_event=heard.append, pauses_s=(0.01,))
        receiver.newest = All(levels)
        with receiver:
            assert receiver.newest.wait(9, SOON_S) is not None
    assert levels == [60] * 5 + [120] * 5
    assert receiver.reconnects == 1
    assert heard[0].startswith(("the stream ended", "the source broke off"))
    assert heard[0].endswith("trying again in 0.01 s")
    assert heard[1] == f"connected again: {source.name}"


def test_a_stream_that_falls_silent_is_given_up(parts: list[bytes]) -> None:
    with http_camera(parts[0], silent=True) as (address, _):
        source = Stream("camera", address, "matroska", {}, "", silence_s=0.3)
        got: list[Frame] = []
        with pytest.raises(VideoError, match=r"broke off|cannot be opened") as caught:
            got.extend(source.frames(threading.Event()))
    assert caught.value.received == "camera: nothing came for 0.3 s"


def test_an_rtsp_camera(tmp_path: Path) -> None:
    path = write_video(tmp_path / "camera.ts", [flat(80)] * 10, [n / 10 for n in range(10)], "h264")
    with rtsp_camera(path) as (address, asked):
        got = taken(source_from(address.replace("rtsp://", "rtsp://me:word@")), 3)
    assert [level(frame) for frame in got] == [80] * 3
    assert asked[:4] == ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"]


def test_streams_that_are_not_there() -> None:
    with socket.socket() as deaf:  # holds a port, and listens to nobody
        deaf.bind(("127.0.0.1", 0))
        for scheme in ("rtsp", "http"):
            with pytest.raises(VideoError, match="cannot be opened") as caught:
                taken(source_from(f"{scheme}://me:word@127.0.0.1:{deaf.getsockname()[1]}/x"))
            assert "Connection refused" in str(caught.value)
            assert "word" not in str(caught.value)
    with pytest.raises(VideoError, match="cannot be opened") as caught:
        taken(source_from("97", size=(640, 480), fps=30))
    assert "/dev/video97: No such file" in str(caught.value)


def test_what_a_camera_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **more: object) -> None:
        asked.append((arguments[0], more["format"], more["options"]))
        raise av.error.FileNotFoundError(2, "No such file")

    monkeypatch.setattr(av, "open", refuse)
    for source in (source_from("3", size=(640, 480), fps=29.97), source_from("/dev/null")):
        with pytest.raises(VideoError, match="cannot be opened"):
            taken(source)
    options = {"video_size": "640x480", "framerate": "29.97"}
    # Any device is taken for a camera, as what /dev/v4l/by-id has.
    assert asked == [("/dev/video3", "v4l2", options), ("/dev/null", "v4l2", {})]


def test_what_a_playlist_names_is_not_opened(tmp_path: Path) -> None:
    """Of names that FFmpeg takes for playlists and segments; without the limits it reads both."""
    segment = write_video(tmp_path / "segment.ts", [flat(80)] * 10, [n / 10 for n in range(10)], "h264")
    with http_camera(*[segment.read_bytes()] * 9) as (address, asked):
        for target in (address.replace("/camera?key=secret", "/segment.ts"), segment.as_uri()):
            playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n".encode()
            with http_camera(*[playlist] * 9) as (outer, _), pytest.raises(VideoError, match="cannot be opened"):
                taken(source_from(outer.replace("/camera?key=secret", "/list.m3u8")), 1)
    assert asked == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody but itself vouches for, with its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs the openssl command")
    folder = tmp_path_factory.mktemp("certificate")
    key, file = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(file)], check=True, capture_output=True)
    file.write_text(file.read_text() + key.read_text())
    return file


def test_a_camera_whose_certificate_nobody_vouches_for(
    certificate: Path, parts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with http_camera(*[parts[0]] * 9, certificate=certificate) as (address, asked):
        assert address.startswith("https://")
        with pytest.raises(VideoError, match="cannot be opened") as caught:
            taken(source_from(address), 1)
        assert asked == []
        assert "SSL_CERT_FILE" in str(caught.value.hint)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert [level(frame) for frame in taken(source_from(address), 1)] == [60]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://me:word@camera:554/1?key=a", "rtsp://camera:554/1?…"),
        ("http://[::1]:80/1", "http://[::1]:80/1"),
        ("rtsp://admin:pa/ss@camera/1", "rtsp://camera/1"),
        ("rtsp://admin:pa#ss@camera/1#part", "rtsp://camera/1"),
        ("rtsp://admin:p@ss@camera/1", "rtsp://camera/1"),
        ("rtsp://admin:pa?ss@camera/1", "rtsp://…"),
        ("http://camera/1?key=a@b", "http://…"),
    ],
)
def test_addresses_for_people_have_no_passwords(address: str, shown: str) -> None:
    assert without_password(address) == shown
    assert source_from(address).name == shown


def test_errors_of_addresses_have_no_passwords() -> None:
    for address in ("rtsp://admin:secret@[camera/1", "rtsp://admin:secret@cam℀era/1", "ftp://admin:secret@camera"):
        with pytest.raises(UsageError, match="address") as error:
            source_from(address)
        assert "secret" not in str(error.value)
    with pytest.raises(VideoError, match="cannot be opened") as caught:
        taken(source_from("rtsp://127.0.0.1:secret/word@camera/1"))
    assert "secret" not in str(caught.value)
    assert "word@" not in str(caught.value)
    assert "%2F" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("missing.mp4", {}, VideoError, "no such source"),
        ("", {}, VideoError, "no such source"),
        ("x" * 5000, {}, VideoError, "no video file"),
        ("missing.png", {}, ImageError, "no image file"),
        ("ftp://host/x.mp4", {}, UsageError, "not read from such an address"),
        ("file:///etc/passwd", {}, UsageError, "not read from such an address"),
        ("rtsp://", {}, UsageError, "not read from such an address"),
        ("http://[", {}, UsageError, "no address"),
        ("0", {"loop": True}, UsageError, "no such settings"),
        ("clip.mp4", {"fps": 5.0}, UsageError, "no such settings"),
        ("photo.png", {"size": (64, 48)}, UsageError, "no such settings"),
        ("rtsp://host/x", {"size": (64, 48), "loop": True}, UsageError, "no such settings"),
        ("0", {"fps": 0.0}, ConfigError, "out of range"),
        ("0", {"size": (0, 48)}, ConfigError, "this size"),
    ],
)
def test_sources_that_are_none(text: str, options: dict[str, object], error: type[FlashVLMError], message: str) -> None:
    with pytest.raises(error, match=message):
        source_from(text, **options)  # type: ignore[arg-type]  # each by its name


def test_sizes() -> None:
    assert size_from("1280x720") == (1280, 720)
    for text in ("1280", "1280x", "-1x2", "1280 x 720"):
        with pytest.raises(UsageError, match="no size"):
            size_from(text)


# A stand-in for gst-launch-1.0: notes what it was called with, then does what a test says.
_LAUNCH = """\
#!{python}
import json, os, re, sys, time
sink = int(re.search(r" fd=(\\d+)", " ".join(sys.argv))[1])
def note(): open({record!r}, "a").write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")
def caps(width, height):
    print(f"/GstPipeline:pipeline0/GstFdSink:frames.GstPad:sink: caps = video/x-raw, width=(int){{width}}, "
          f"height=(int){{height}}, framerate=(fraction)30/1, format=(string)RGBA", flush=True)
# Blue with some transparency, which is not shown.
def send(count): os.write(sink, bytes((0, 0, 200, 7)) * 24 * count)
note()
print("Setting pipeline to PAUSED ...", flush=True)
{body}
"""
Install = Callable[[str], Path]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that makes gst-launch-1.0 do something, and returns the file that notes its calls."""

    def install(body: str) -> Path:
        script, record = tmp_path / "bin" / "gst-launch-1.0", tmp_path / "record"
        script.parent.mkdir(exist_ok=True)
        script.write_text(_LAUNCH.format(python=sys.executable, record=str(record), body=body))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
        return record

    return install


def test_a_csi_camera_is_nvarguscamerasrc(launch: Install) -> None:
    record = launch("caps(6, 4); send(3); time.sleep(60)")
    with closing(source_from("csi:1", size=(6, 4), fps=29.97).frames(threading.Event())) as frames:
        for _ in range(3):
            pixels = np.asarray(next(frames).decode())
            assert pixels.shape == (4, 6, 3)
            assert (pixels == (0, 0, 200)).all()
    process, *arguments = json.loads(record.read_text())
    assert " ".join(arguments[:-4]) == (
        "-v nvarguscamerasrc sensor-id=1 "
        "! video/x-raw(memory:NVMM),format=NV12,width=6,height=4,framerate=29970/1000 "
        "! nvvidconv ! video/x-raw,format=RGBA !"
    )
    assert arguments[-4:-2] == ["fdsink", "name=frames"]
    assert arguments[-1] == "sync=false"
    with pytest.raises(ProcessLookupError):  # it was ended, and waited for
        os.kill(process, 0)


def test_a_csi_camera_has_usual_settings(launch: Install) -> None:
    record = launch("caps(6, 4); send(1)")
    assert len(taken(source_from("csi"), 1)) == 1
    arguments = json.loads(record.read_text())
    assert "sensor-id=0" in arguments
    assert "video/x-raw(memory:NVMM),format=NV12,width=1280,height=720,framerate=30000/1000" in arguments


def test_a_pipeline_is_not_seen_by_a_shell(launch: Install, tmp_path: Path) -> None:
    record = launch("caps(6, 4); send(2)")
    written = f"somesrc name='a b' $(touch {tmp_path}/touched) ! 'video/x-raw(memory:NVMM),width=6'"
    assert len(taken(source_from(f"gst:{written}"))) == 2
    arguments = json.loads(record.read_text())[2:]
    assert arguments[:7] == [
        "somesrc",
        "name=a b",
        "$(touch",
        f"{tmp_path}/touched)",
        "!",
        "video/x-raw(memory:NVMM),width=6",
        "!",
    ]
    assert arguments[7:10] == ["videoconvert", "!", "video/x-raw,format=RGBA"]
    assert arguments[-1] == "sync=true"
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("body", "frames", "message"),
    [
        ("print('Error generated. execute:751 No cameras available', flush=True)", 0, "No cameras available"),
        ("print('WARNING: erroneous pipeline: no element', file=sys.stderr); sys.exit(1)", 0, "erroneous pipeline"),
        ("sys.exit(3)", 0, "exit code 3"),
        ("caps(6, 4); send(2)", 2, "exit code 0"),
        ("caps(6, 4); send(2); os.write(sink, bytes(50)); sys.exit(1)", 2, "exit code 1"),
    ],
)
def test_a_camera_that_does_not_deliver(body: str, frames: int, message: str, launch: Install) -> None:
    """A camera's pipeline does not end well, whatever its exit code; half a frame is none."""
    launch(body)
    got: list[Frame] = []
    with pytest.raises(VideoError, match="broke off" if frames else "no frames") as caught:
        got.extend(source_from("csi").frames(threading.Event()))
    assert message in str(caught.value.received)
    assert len(got) == frames


def test_a_camera_whose_frames_change_their_size(launch: Install, tmp_path: Path) -> None:
    """It breaks off, and has the new size when it is opened again."""
    go = tmp_path / "go"
    wait = f"\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    launch(f"caps(6, 4); send(2){wait}caps(9, 9)\nwhile True: send(1)")
    with closing(source_from("csi").frames(threading.Event())) as frames:
        assert len(list(islice(frames, 2))) == 2
        go.touch()
        with pytest.raises(VideoError, match="broke off") as caught:
            list(frames)
    assert "now of 9 x 9" in str(caught.value.received)


def test_a_pipeline_that_fails_after_frames_has_not_ended(launch: Install) -> None:
    launch("caps(6, 4); send(2); sys.exit(1)")
    got: list[Frame] = []
    with pytest.raises(VideoError, match="broke off"):
        got.extend(source_from("gst:somesrc").frames(threading.Event()))
    assert len(got) == 2


def test_a_pipeline_that_does_not_end_when_told_is_killed(launch: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gstreamer, "_LONGEST_END_S", 0.2)
    record = launch("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); caps(6, 4); send(1); time.sleep(60)")
    assert len(taken(source_from("csi"), 1)) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(json.loads(record.read_text())[0], 0)


def test_without_jetpacks_elements_the_hint_says_where_they_are(launch: Install) -> None:
    launch("print('WARNING: erroneous pipeline: no element \"nvarguscamerasrc\"'); sys.exit(1)")
    with pytest.raises(VideoError, match="no Jetson, or a container"):
        taken(source_from("csi"))


def test_a_pipeline_that_cannot_be_started_is_an_error_of_the_source(
    launch: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a source that broke off is opened again where memory or processes were short for a while."""
    launch("")
    source = source_from("csi")

    def refuse(*arguments: object, **more: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = list(Path("/proc/self/fd").iterdir())
    with pytest.raises(VideoError, match="Resource temporarily unavailable"):
        taken(source)
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_pipelines_for_people_have_no_passwords(launch: Install) -> None:
    written = "rtspsrc location=rtsp://admin:pa/secret@cam/1?key=secret user-pw='my secret' latency=0 ! decodebin"
    launch("print('ERROR: no answer of rtsp://admin:secret@cam/1', flush=True); sys.exit(1)")
    source = source_from(f"gst:{written}")
    assert source.name == "gst:rtspsrc location=rtsp://…@cam/1?… user-pw=… latency=0 ! decodebin"
    with pytest.raises(VideoError, match=r"no answer of rtsp://…@cam/1") as caught:
        taken(source)
    assert "secret" not in str(caught.value)
    for wrong in (f"gst:{written} name='a", f"gst:{written} !"):
        with pytest.raises(UsageError) as refused:
            source_from(wrong)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("body", ["time.sleep(60)", "caps(6, 4); send(1); time.sleep(60)"])
def test_a_pipeline_that_hangs_is_given_up_or_stopped(body: str, launch: Install) -> None:
    launch(body)
    source = GStreamer("hanging", ["somesrc"], ends=True, paced=True, hint="", silence_s=0.3)
    with pytest.raises(VideoError, match=r"broke off|no frames") as caught:
        taken(source)
    assert caught.value.received == "hanging: nothing came for 0.3 s"
    patient = GStreamer("hanging", ["somesrc"], ends=True, paced=True, hint="")
    with Receiver(patient, on_event=print) as receiver:
        receiver.newest.wait(timeout_s=0.5)
    assert not receiver._thread.is_alive()
    assert receiver.error is None


def test_pipelines_that_are_none(launch: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("")
    for text in ("gst:", "gst:videotestsrc !"):
        with pytest.raises(UsageError, match="no pipeline"):
            source_from(text)
    with pytest.raises(UsageError, match="quotes"):
        source_from("gst:videotestsrc name='a")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(DependencyError, match="needs GStreamer"):
        source_from("csi")


def test_gstreamer_itself() -> None:
    if shutil.which("gst-launch-1.0") is None:
        pytest.skip("needs gst-launch-1.0")
    caps = "video/x-raw,width=66,height=50,framerate=50/1"
    source = source_from(f"gst:videotestsrc pattern=red num-buffers=8 ! '{caps}'")
    with Receiver(source, on_event=print) as receiver:
        receiver._thread.join(SOON_S)
    assert (receiver.newest.number, receiver.error) == (8, None)
    newest = receiver.newest.wait()
    assert newest is not None
    pixels = np.asarray(newest[1].decode())
    assert pixels.shape == (50, 66, 3)
    assert (abs(pixels.astype(int) - (255, 0, 0)) < 4).all()
    with pytest.raises(VideoError, match="no frames") as caught:
        taken(source_from("gst:filesrc location=/nothing ! decodebin"))
    assert "Resource not found" in str(caught.value.received)
