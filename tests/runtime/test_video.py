"""Videos read from files that were written frame by frame, and the newest frames of a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashvlm_export.errors import ConfigError, VideoError
from flashvlm_export.runtime.video import MOST_FRAMES, FrameWindow, Video, read_video

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


def test_a_playlist_opens_nothing_else(steady: Path, tmp_path: Path) -> None:
    """What a file names is not opened: neither other files nor addresses."""
    for target in (steady.as_uri(), str(steady), "http://127.0.0.1:9/video.mp4"):
        playlist = tmp_path / "list.m3u8"
        playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n")
        with pytest.raises(VideoError):
            read_video(playlist, frames=1)
        script = tmp_path / "list.txt"
        script.write_text(f"ffconcat version 1.0\nfile {target}\n")
        with pytest.raises(VideoError):
            read_video(script, frames=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "no number of frames"),
        ({"frames": MOST_FRAMES + 1}, "no number of frames"),
        ({"fps": 0.0}, "more than none"),
        ({"fps": float("nan")}, "more than none"),
        ({}, "by count or by rate"),
        ({"frames": 2, "fps": 1.0}, "by count or by rate"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, float], message: str, steady: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_video(steady, **options)


def test_more_frames_than_there_are_is_refused(steady: Path) -> None:
    for options in ({"frames": 21}, {"fps": 30.0}):
        with pytest.raises(VideoError, match="fewer frames than asked for") as caught:
            read_video(steady, **options)
        assert caught.value.expected == "at most 20"


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(VideoError, match="some frames"):
        Video([])
    with pytest.raises(ConfigError, match="more than none"):
        Video([frame(0)], 0.0)


def test_a_window_drops_whole_moments() -> None:
    window = FrameWindow(4, 2.0, frames_per_moment=2)
    lengths = []
    for number in range(7):
        video = window.push(frame(number))
        lengths.append(len(video.frames))
        assert video.fps == 2.0
    assert lengths == [1, 2, 3, 4, 3, 4, 3]
    assert np.array_equal(np.asarray(video.frames[0]), np.asarray(frame(4)))
    with pytest.raises(ConfigError, match="whole moments"):
        FrameWindow(3, 1.0, frames_per_moment=2)
