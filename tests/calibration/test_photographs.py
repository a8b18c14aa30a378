"""Where images and prompts come from, and what is said of those that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashvlm_export.calibration import photographs
from flashvlm_export.calibration.photographs import images_in, packaged_photographs, read_prompts, readable
from flashvlm_export.errors import ImageError, PromptError, UsageError
from flashvlm_export.progress import Progress
from flashvlm_export.runtime.images import load_image


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_images_are_found_below_the_folder_in_a_fixed_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a/z.png", "a/notes.txt", ".hidden/c.png", ".d.png", "e.webp")
    assert [str(path.relative_to(tmp_path)) for path in images_in(tmp_path, 10)] == ["a/z.png", "b.JPG", "e.webp"]


def test_of_too_many_images_some_are_taken_from_all_over(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number:03}.png" for number in range(100)))
    assert [path.stem for path in images_in(tmp_path, 4)] == ["012", "037", "062", "087"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such image folder"), ("file.png", "no such image folder"), ("empty", "no images in the folder")],
)
def test_a_folder_without_images(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path, "file.png", "empty/readme.md")
    with pytest.raises(UsageError, match=message) as caught:
        images_in(tmp_path / name, 10)
    assert str(tmp_path / name) in str(caught.value)


def test_bad_images_are_named_or_left_out_on_demand(photos: Path, tmp_path: Path) -> None:
    good = photos / "0.png"
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no picture")
    images = [tmp_path / "empty.png", good, tmp_path / "cut.png", tmp_path / "text.jpg"]
    with pytest.raises(ImageError, match="3 of 4 images cannot be read") as caught:
        readable(images, load_image, skip_bad=False, progress=Progress())
    assert all(name in str(caught.value) for name in ("empty.png", "cut.png", "text.jpg", "--skip-bad"))
    kept, skipped = readable(images, load_image, skip_bad=True, progress=Progress())
    assert kept == [good]
    assert [reason.partition(":")[0] for reason in skipped] == ["empty.png", "cut.png", "text.jpg"]


def test_a_folder_of_nothing_but_bad_images_cannot_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match="1 of 1") as caught:
        readable([tmp_path / "empty.png"], load_image, skip_bad=True, progress=Progress())
    assert "--skip-bad" not in str(caught.value)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffWhat is it?\r\n  Wo ist sie? \n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["What is it?", "Wo ist sie?"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", PromptError, "the prompt file is empty"),
        (b"What?\n\n  \nWhere?\n", PromptError, "line 2, 3"),
        (b"\xff\xfe\x00", UsageError, "cannot be read"),
        (None, UsageError, "No such file"),
    ],
)
def test_prompt_files_that_cannot_be_used(
    tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(error, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_packaged_photographs_are_real_pictures_or_an_error_asks_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="the photographs are those of scikit-image and scikit-learn")
    found = packaged_photographs()
    assert len(found) >= 5
    assert all(min(load_image(path).size) >= 150 for path in found)
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--images DIR"):
        packaged_photographs()
