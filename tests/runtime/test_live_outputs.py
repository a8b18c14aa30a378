"""What is drawn over a frame, where it is written, and that a recording is whole whatever ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from flashvlm_export.errors import ConfigError, LLMError, StorageError
from flashvlm_export.runtime.layout import ImageLayout, clip, one_picture
from flashvlm_export.runtime.live.drawing import draw_frame, numbers, with_words, wrapped
from flashvlm_export.runtime.live.outputs import output_to
from flashvlm_export.runtime.live.watch import Seen, Statistics
from flashvlm_export.runtime.llm.base import GenerationStats
from flashvlm_export.runtime.prompt import TokenizedPrompt
from flashvlm_export.runtime.request import Answer, PrunedPrompt, SelectedImage

GREY = 120


def seen_of(layout: ImageLayout, kept: list[int], *, size: tuple[int, int] = (40, 40), text: str = "yes") -> Seen:
    """An answered grey frame of which some visual tokens are kept."""
    zero, indices = np.zeros(1, np.int64), np.array(kept)
    image = SelectedImage(np.zeros((len(kept), 4)), indices, indices, np.zeros(layout.num_tokens), layout)
    prompt = PrunedPrompt(np.zeros((1, 4)), zero, TokenizedPrompt("", zero, (0,), zero > 0), [image], {})
    answer = Answer(text, [1], prompt, GenerationStats(1, 0, 1, 0.0, 0.0, "stop"))
    statistics = Statistics(2.0, 30, 4, 26, 15.0, 2.0, 200.0, 250.0, 0)
    return Seen(4, 30, 1.9, 210.0, Image.new("RGB", size, (GREY,) * 3), answer, statistics)


def middles(picture: Image.Image, rows: int, columns: int, size: tuple[int, int] = (640, 640)) -> list[list[int]]:
    """Grey levels in the middle of each cell of the drawn frame."""
    pixels = np.asarray(picture)
    steps = size[1] // rows, size[0] // columns
    left = (picture.width - size[0]) // 2
    return [
        [int(pixels[y * steps[0] + steps[0] // 2, left + x * steps[1] + steps[1] // 2].mean()) for x in range(columns)]
        for y in range(rows)
    ]


def sheet(seen: Seen) -> Image.Image:
    """What a recording shows of it."""
    return with_words(draw_frame(seen), seen, "Is it?")


def test_kept_tokens_stay_bright() -> None:
    picture = draw_frame(seen_of(one_picture((2, 3)), [0, 4]))
    bright, dim = GREY, GREY // 3
    assert middles(picture, 2, 3) == [[bright, dim, dim], [dim, bright, dim]]
    # Their rim is drawn where it meets what is dropped, not at the border of the frame.
    pixels = np.asarray(picture)
    assert tuple(pixels[160, 213]) == (251, 180, 26)
    assert tuple(pixels[160, 0]) == (GREY,) * 3


def test_tokens_of_overview_and_tiles_are_shown_together() -> None:
    layout = ImageLayout(((1, 2), (2, 2)))
    picture = draw_frame(seen_of(layout, [0, 5]))
    assert middles(picture, 2, 2) == [[GREY, GREY // 3], [GREY, GREY]]


def test_of_a_window_the_newest_moment_is_shown() -> None:
    layout = clip([one_picture((2, 2))] * 3, range(3))
    picture = draw_frame(seen_of(layout, [0, 1, 4, 11]))
    assert middles(picture, 2, 2) == [[GREY // 3, GREY // 3], [GREY // 3, GREY]]


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (3, 400), (1280, 720)])
def test_all_pictures_of_a_run_have_one_even_size(size: tuple[int, int]) -> None:
    short, long = (sheet(seen_of(one_picture((2, 2)), [1], size=size, text=text)) for text in ("", "no " * 400))
    assert short.size == long.size
    assert short.width % 2 == short.height % 2 == 0


def test_words_are_readable_and_within_the_picture() -> None:
    seen = seen_of(one_picture((2, 2)), [1])
    strip = np.asarray(sheet(seen))[640:]
    assert strip.max() == 255  # white
    assert strip[:, 0].max() == strip[:, -1].max() == strip[0].max() == 16  # the ground, all around
    blank = np.asarray(sheet(seen_of(one_picture((2, 2)), [1], text="")))[640:]
    changed = np.flatnonzero((strip != blank).any((1, 2)))
    assert len(changed)
    assert 12 + 2 * 26 <= changed[0] <= changed[-1] < 12 + 5 * 26  # the lines of the answer


def test_figures_in_words() -> None:
    """Each in its place: they are all different."""
    seen = seen_of(one_picture((2, 3)), [0, 4])
    assert numbers(seen) == ("kept 2 of 6 tokens, latency 210 ms, source 15.0 frames/s, 2.0 answers/s, 26 dropped")


def test_wrapping() -> None:
    font = ImageFont.load_default(18)
    text = "one two three four five six seven eight nine ten"
    lines = wrapped(text, 150, 9, font)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 150 for line in lines)
    assert len(lines) > 2
    cut = wrapped(text, 150, 2, font)
    assert cut[0] == lines[0]
    assert cut[1].endswith("…")
    assert font.getlength(cut[1]) <= 150
    unbroken = wrapped("x" * 60, 150, 9, font)
    assert "".join(unbroken) == "x" * 60
    assert all(font.getlength(line) <= 150 for line in unbroken)
    assert wrapped(" \n ", 150, 2, font) == []


def grey(level: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


def played(path: Path) -> list[tuple[float, int]]:
    """Time and grey level of each frame of a recording, to the nearest ten."""
    import av

    with av.open(str(path)) as container:
        return [
            (
                round(float(shot.pts * shot.time_base), 3),
                int(round(float(np.asarray(shot.to_image()).mean()) / 10) * 10),
            )
            for shot in container.decode(video=0)
        ]


def test_the_newest_picture(tmp_path: Path) -> None:
    path = tmp_path / "newest.png"
    with output_to(path) as output:
        for level in (50, 90):
            output.add(grey(level), 0)
            assert np.asarray(Image.open(path)).max() == level
    assert list(tmp_path.iterdir()) == [path]


def ended_by(error: BaseException | None, path: Path) -> None:
    with output_to(path) as output:
        output.add(grey(50), 0.5)
        output.add(grey(100), 1.25)
        assert not path.exists()
        output.add(grey(150, (30, 30)), 1.25)  # at once, and of another size
        if error is not None:
            raise error


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), LLMError("too long")])
def test_a_recording_is_whole_whatever_ends_the_run(error: BaseException | None, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="recordings need PyAV")
    path = tmp_path / f"clip{suffix}"
    if error is None:
        ended_by(None, path)
    else:
        with pytest.raises(type(error)):
            ended_by(error, path)
    assert list(tmp_path.iterdir()) == [path]
    frames = played(path)
    assert [time for time, _ in frames] == [0.5, 1.25, 1.251, 2.251]  # the last picture is shown for a second
    assert [level for _, level in frames[:2]] == [50, 100]
    assert frames[2][1] > 90


def test_without_a_picture_there_is_no_recording(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="recordings need PyAV")
    with output_to(tmp_path / "clip.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_recording(small_disk: Path) -> None:
    pytest.importorskip("av", reason="recordings need PyAV")
    noise = np.random.default_rng(0)

    def record() -> None:
        with output_to(small_disk / "clip.mp4") as output:
            for number in range(60):
                output.add(Image.fromarray(noise.integers(0, 256, (480, 640, 3), np.uint8)), number / 10)

    with pytest.raises(StorageError, match="disk is full"):
        record()
    assert list(small_disk.iterdir()) == []


def test_bad_outputs_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (tmp_path / "clip.avi", r"expected: a name ending in \.mp4, \.mkv, \.png, \.jpg"),
        (tmp_path / "nowhere" / "newest.png", "folder does not exist"),
    ]
    for path, message in cases:
        with pytest.raises(ConfigError, match=message):
            output_to(path)


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    """It may be the source."""
    path = tmp_path / "newest.png"
    path.write_bytes(b"mine")
    with pytest.raises(StorageError, match="exists already"):
        output_to(path)
    assert path.read_bytes() == b"mine"
    with output_to(path, overwrite=True) as output:
        output.add(grey(50), 0)
    assert np.asarray(Image.open(path)).max() == 50


def test_an_unwritable_recording(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="recordings need PyAV")
    with pytest.raises(ConfigError, match="folder does not exist"):
        output_to(tmp_path / "nowhere" / "clip.mp4")
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        output_to(tmp_path / "taken.mp4")

    def record() -> None:
        with output_to(tmp_path / "late.mp4") as output:
            output.add(grey(50), 0)
            (tmp_path / "late.mp4").mkdir()  # by somebody else, in the meantime

    with pytest.raises(StorageError):
        record()
    (tmp_path / "late.mp4").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["taken.mp4"]
