"""Videos read from files that were written frame by frame, and the newest frames of a stream."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.errors import ConfigError, ImageError, VideoError
from flashvlm_export.runtime import video_file
from flashvlm_export.runtime.video import MOST_FRAMES, FrameWindow, Video
from flashvlm_export.runtime.video_file import read_video

pytest.importorskip("av", reason="reading video files needs PyAV")
import av
from helpers.clips import flat, frame, write_video


def levels(video: Video) -> list[int]:
    """Return the grey level of each frame, to the nearest ten."""
    return [int(round(float(np.asarray(each).mean()) / 10) * 10) for each in video.frames]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of levels 10, 20, …, 200, ten a second."""
    path = tmp_path_factory.mktemp("video") / "steady.mp4"
    return write_video(path, [flat(10 * number) for number in range(1, 21)], [number / 10 for number in range(20)])


def test_frames_by_count_begin_equal_parts(steady: Path) -> None:
    video = read_video(steady, frames=5)
    assert levels(video) == [10, 50, 90, 130, 170]
    assert video.fps == pytest.approx(2.5)
    assert levels(read_video(steady, frames=1)) == [10]
    assert levels(read_video(steady, frames=20)) == [10 * number for number in range(1, 21)]


def test_frames_by_rate(steady: Path) -> None:
    video = read_video(steady, fps=2)
    assert levels(video) == [10, 60, 110, 160]
    assert video.fps == 2


def test_of_variable_rate_the_frame_that_is_shown_is_taken(tmp_path: Path) -> None:
    """One frame stands for two seconds, then four come in one."""
    times = [0, 2, 2.25, 2.5, 2.75]
    path = write_video(tmp_path / "variable.mp4", [flat(level) for level in (10, 60, 110, 160, 210)], times)
    assert levels(read_video(path, fps=1)) == [10, 10, 60]
    assert levels(read_video(path, frames=5)) == [10, 10, 10, 60, 210]  # every 0.6875 s


@pytest.mark.parametrize(("codec", "name"), [("ffv1", "lossless.mkv"), ("mjpeg", "pictures.avi"), ("h264", "h264.mp4")])
def test_formats(codec: str, name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, [flat(10 * number) for number in range(1, 9)], [n / 4 for n in range(8)], codec)
    assert levels(read_video(path, frames=4)) == [10, 30, 50, 70]


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for number in (3, 1, 2, 4):
        flat(10 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    video = read_video(tmp_path, fps=4)
    assert [Path(str(each)).name for each in video.frames] == ["1.png", "2.png", "3.png", "4.png"]
    assert video.fps == 4
    half = read_video(tmp_path, frames=2, fps=4)
    assert [Path(str(each)).name for each in half.frames] == ["1.png", "3.png"]
    assert half.fps == 2


def test_what_is_no_video_is_refused(steady: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(steady.read_bytes()[:700])
    with pytest.raises(VideoError, match="no video file at this path"):
        read_video(tmp_path / "missing.mp4", frames=1)
    for path in (tmp_path / "text.mp4", cut):
        with pytest.raises(VideoError, match="can be read") as caught:
            read_video(path, frames=1)
        assert str(path) in str(caught.value.received)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="too few pictures"):
        read_video(tmp_path / "empty")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="has no video") as caught:
        read_video(path, frames=1)
    assert "audio" in str(caught.value.received)


def test_a_broken_frame_is_refused_with_its_time(tmp_path: Path) -> None:
    """The packet of the sixth of ten frames, half a second in, holds rubbish."""
    path = write_video(
        tmp_path / "whole.avi", [frame(n, (64, 48)) for n in range(10)], [n / 10 for n in range(10)], "mjpeg"
    )
    with av.open(str(path)) as container:
        sizes = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    position, size = sizes[5]
    content[position + 8 : position + size] = b"\0" * (size - 8)
    (tmp_path / "broken.avi").write_bytes(content)
    assert len(read_video(path, frames=10).frames) == 10
    with pytest.raises(VideoError, match="frame of the video is broken") as caught:
        read_video(tmp_path / "broken.avi", frames=10)
    assert "0.50 s" in str(caught.value.received)


@pytest.fixture
def served(steady: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a transport stream on a server on loopback, and what was asked of it."""
    write_video(tmp_path / "segment.ts", [flat(100)] * 5, [n / 5 for n in range(5)], "h264")
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *parts: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/segment.ts", asked
        server.shutdown()
        thread.join()


def test_a_playlist_opens_nothing_else(served: tuple[str, list[str]], tmp_path: Path) -> None:
    """What a file names is not opened: neither other files nor addresses, though both are there."""
    url, asked = served
    assert len(read_video(tmp_path / "segment.ts", frames=3).frames) == 3
    for target in (url, str(tmp_path / "segment.ts"), (tmp_path / "segment.ts").as_uri(), "segment.ts"):
        for name, text in {
            "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
            "list.ffconcat": f"ffconcat version 1.0\nfile {target}\n",
        }.items():
            (tmp_path / name).write_text(text)
            with pytest.raises(VideoError):
                read_video(tmp_path / name, frames=1)
    assert asked == []


def test_a_rotated_video_is_turned_upright(tmp_path: Path) -> None:
    """Bright at the left as it is stored, and to be shown turned by a quarter: bright at the top or at the bottom."""
    picture = Image.new("RGB", (64, 48))
    picture.paste((255, 255, 255), (0, 0, 32, 48))
    for degrees, bright in ((90, "bottom"), (-90, "top")):
        path = tmp_path / "turned.mp4"
        write_video(path, [picture] * 3, [0, 1, 2], rotation=degrees)
        (seen,) = read_video(path, frames=1).frames
        assert seen.size == (48, 64)
        halves = {"top": seen.crop((0, 0, 48, 32)), "bottom": seen.crop((0, 32, 48, 64))}
        assert np.asarray(halves.pop(bright)).mean() > 240
        assert np.asarray(halves.popitem()[1]).mean() < 15


def test_a_clip_that_starts_late_is_sampled_from_its_start(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "late.mkv", [flat(10 * n) for n in range(1, 11)], [5 + n / 10 for n in range(10)], "ffv1"
    )
    assert levels(read_video(path, frames=5)) == [10, 30, 50, 70, 90]
    assert levels(read_video(path, fps=5)) == [10, 30, 50, 70, 90]


def test_a_title_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    path = write_video(tmp_path / "titled.avi", [flat(50)] * 3, [0, 1, 2], title="TITLE")
    path.write_bytes(path.read_bytes().replace(b"TITLE", b"T\xefTLE"))
    assert levels(read_video(path, frames=3)) == [50, 50, 50]


def test_frames_out_of_order_are_refused(tmp_path: Path) -> None:
    """AVI does not say when frames are shown that depend on later ones."""
    pictures = [frame(n, (64, 48)) for n in range(20)]
    path = write_video(tmp_path / "shuffled.avi", pictures, [n / 10 for n in range(20)], "h264")
    with pytest.raises(VideoError, match="not in order"):
        read_video(path, frames=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "a video is 1 to 768 frames"),
        ({"frames": MOST_FRAMES + 1}, "a video is 1 to 768 frames"),
        ({"frames": 2.5}, "a video is 1 to 768 frames"),
        ({"fps": 0.0}, "frames per second are out of range"),
        ({"fps": float("nan")}, "frames per second are out of range"),
        ({"fps": "2"}, "frames per second are out of range"),
        ({"fps": 1000.0}, "a video is 1 to 768 frames"),
        ({"frames": 2, "fps": 1.0}, "by count or by rate"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str, steady: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_video(steady, **options)


def test_where_nothing_is_said_sixteen_frames_are_taken_or_all(steady: Path, tmp_path: Path) -> None:
    assert len(read_video(steady).frames) == 16
    short = write_video(tmp_path / "short.mp4", [flat(50)] * 3, [0, 1, 2])
    assert len(read_video(short).frames) == 3
    with pytest.raises(VideoError, match="fewer frames than asked for") as caught:
        read_video(short, frames=4)
    assert caught.value.expected == "at most 3"
    # More often than they come: each is shown until the next one.
    assert levels(read_video(steady, fps=20))[:4] == [10, 10, 20, 20]


def test_frames_that_do_not_fit_into_memory_are_refused(steady: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_file, "MOST_BYTES", 3 * 64 * 48 * 4)
    assert len(read_video(steady, frames=4).frames) == 4
    with pytest.raises(VideoError, match="do not fit into memory"):
        read_video(steady, frames=5)


def test_bad_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 to 768 frames"):
        Video([])
    with pytest.raises(ConfigError, match="out of range"):
        Video([frame(0)], 1e-30)
    with pytest.raises(VideoError, match="not the frames of a video"):
        Video("clip.mp4")
    for bad in ("", "x" * 5000, "nothing\0there", "http://example.com/clip.mp4"):
        with pytest.raises(VideoError, match="no video file at this path"):
            read_video(bad, frames=1)
    for settings in ({"frames": 1000}, {"fps": 0.0}, {"frames_per_moment": 0}, {"frames": 5, "frames_per_moment": 2}):
        with pytest.raises(ConfigError):
            FrameWindow(**{"frames": 4, "fps": 1.0, **settings})


def test_a_window_drops_whole_moments() -> None:
    window = FrameWindow(4, 2.0, frames_per_moment=2)
    lengths = []
    for number in range(7):
        video = window.push(frame(number))
        lengths.append(len(video.frames))
        assert video.fps == 2.0
    assert lengths == [1, 2, 3, 4, 3, 4, 3]
    assert np.array_equal(np.asarray(video.frames[0]), np.asarray(frame(4)))
    with pytest.raises(ImageError):
        window.push("nothing.png")
    assert len(window.push(frame(7)).frames) == 4  # as if it had not been there
