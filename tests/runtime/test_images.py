from __future__ import annotations

import base64
import contextlib
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.errors import ImageError
from flashvlm_export.runtime.images import load_image


def scene(height: int = 37, width: int = 53) -> Image.Image:
    """Smooth colours with noise on top: unlike in a flat picture, a swapped axis or channel shows."""
    rows, columns = np.mgrid[:height, :width]
    levels = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 256], -1)
    noise = np.random.default_rng(0).integers(0, 20, levels.shape)
    return Image.fromarray(np.clip(levels + noise, 0, 255).astype(np.uint8))


def with_alpha(mode: str) -> Image.Image:
    image = scene().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def palette_with_alpha() -> Image.Image:
    image = scene().quantize(64)
    image.info["transparency"] = bytes(range(64))
    return image


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FILES: dict[str, Callable[[Path], Path]] = {
    "rgb.png": lambda path: save(scene(), path),
    "rgb.jpg": lambda path: save(scene(), path, quality=90),
    "rgb.webp": lambda path: save(scene(), path, lossless=True),
    "rgb.bmp": lambda path: save(scene(), path),
    "rgb.tif": lambda path: save(scene(), path),
    "grey.png": lambda path: save(scene().convert("L"), path),
    "bilevel.png": lambda path: save(scene().convert("1"), path),
    "grey_alpha.png": lambda path: save(with_alpha("L"), path),
    "rgba.png": lambda path: save(with_alpha("RGB"), path),
    "rgba.webp": lambda path: save(with_alpha("RGB"), path, lossless=True),
    "palette.png": lambda path: save(scene().quantize(64), path),
    "palette_alpha.png": lambda path: save(palette_with_alpha(), path, transparency=bytes(range(64))),
    "palette_one_clear.png": lambda path: save(scene().quantize(64), path, transparency=3),
    "palette.gif": lambda path: save(scene().quantize(64), path),
    "animated.gif": lambda path: save(
        scene().quantize(64), path, save_all=True, append_images=[scene().rotate(90).quantize(64)]
    ),
    "cmyk.jpg": lambda path: save(scene().convert("CMYK"), path),
    "cmyk.tif": lambda path: save(scene().convert("CMYK"), path),
    "one_pixel.png": lambda path: save(scene(1, 1), path),
    "wide.png": lambda path: save(scene(2, 20_000), path),
    "eight_bits_in_16.png": lambda path: save(
        Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16)), path
    ),
    **{
        f"exif_{orientation}.jpg": lambda path, orientation=orientation: save(
            scene(), path, exif=turned(orientation), quality=90
        )
        for orientation in range(1, 9)
    },
}


@pytest.mark.parametrize("name", FILES)
def test_file_gives_the_pixels_of_transformers_load_image(name: str, tmp_path: Path) -> None:
    oracle = pytest.importorskip("transformers.image_utils", reason="the oracle is transformers' load_image")
    path = FILES[name](tmp_path / name)
    image = load_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the oracle warns of, this package must not
        expected = oracle.load_image(str(path))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("name", FILES)
def test_path_bytes_data_url_and_pil_agree(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path / name)
    content = path.read_bytes()
    expected = np.asarray(load_image(path))
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    for source in (str(path), content, url, Image.open(io.BytesIO(content))):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


def test_exif_turns_the_image_upright(tmp_path: Path) -> None:
    upright = scene()
    path = save(upright.transpose(Image.Transpose.ROTATE_90), tmp_path / "a.png", exif=turned(6))
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(upright))


def test_16_bit_greyscale_keeps_its_tones_instead_of_clipping_to_white(tmp_path: Path) -> None:
    tones = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for name in ("a.png", "a.tif"):
        pixels = np.asarray(load_image(save(Image.fromarray(tones), tmp_path / name)))
        assert (pixels == pixels[:, :, :1]).all()
        # Within one level of the exact rescaling to 8 bits.
        assert np.abs(pixels[:, :, 0] - tones / 257).max() <= 1


@pytest.mark.parametrize("levels", [np.array([[-1.0, 2.0]]), np.array([[0.0, 1e5]]), np.array([[0.5, 300.0]])])
def test_float_greyscale_without_a_defined_white_is_refused(levels: np.ndarray) -> None:
    with pytest.raises(ImageError, match="no defined black and white"):
        load_image(Image.fromarray(levels.astype(np.float32)))


def test_pil_source_is_not_changed() -> None:
    source = palette_with_alpha()
    before = source.tobytes(), dict(source.info)
    load_image(source)
    assert (source.tobytes(), dict(source.info)) == before


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_uint8_array(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    colour = np.broadcast_to(array.reshape(5, 7, -1)[:, :, :3], (5, 7, 3))
    np.testing.assert_array_equal(np.asarray(load_image(array)), colour)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 7, 3), np.float32),
        np.zeros((5, 7, 3), np.uint16),
        np.zeros((3, 50, 70), np.uint8),
        np.zeros((5, 7, 2), np.uint8),
        np.zeros((0, 7, 3), np.uint8),
        np.zeros(5, np.uint8),
    ],
    ids=str,
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"received: \w+ \[") as caught:
        load_image(array)
    assert "uint8 [height, width]" in caught.value.expected


def test_path_problems_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    cases = {
        tmp_path / "none.png": "no such file",
        tmp_path: "a directory",
        Path("/dev/null"): "not a regular file",
        "a\0b.png": "received",
        "x" * 5000: "",
        tmp_path / "empty.png": "the image file is empty",
        tmp_path / "text.png": "of no known format",
    }
    for source, said in cases.items():
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert said in str(caught.value)


@pytest.mark.parametrize("source", [b"", b"junk", 5, None, "data:image/png;base64,@@", "data:text/plain,hello"])
def test_no_image_at_all(source: object) -> None:
    with pytest.raises(ImageError):
        load_image(source)


@pytest.mark.parametrize("url", ["http://example.org/a.png", "https://example.org/a.png"])
def test_urls_are_not_fetched(url: str) -> None:
    with pytest.raises(ImageError, match="not fetched") as caught:
        load_image(url)
    assert "download" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["rgb.png", "rgb.jpg", "rgb.webp", "rgb.bmp", "rgb.tif", "palette.gif"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_file_is_refused(name: str, kept: float, tmp_path: Path) -> None:
    content = FILES[name](tmp_path / name).read_bytes()
    with pytest.raises(ImageError) as caught:
        load_image(content[: int(len(content) * kept)])
    assert caught.value.received


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for name in ("rgb.png", "rgb.jpg", "rgb.tif", "palette.gif", "exif_6.jpg"):
        content = np.frombuffer(FILES[name](tmp_path / name).read_bytes(), np.uint8)
        for _ in range(40):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 8)] = rng.integers(0, 256, 8)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow may remark on a damaged EXIF block
                with contextlib.suppress(ImageError):  # read or refused: anything else fails the test
                    load_image(damaged.tobytes())


def test_too_many_pixels_are_refused_before_decoding() -> None:
    path = io.BytesIO()
    Image.new("1", (1000, 1000)).save(path, "PNG")
    # Cut behind the header: had decoding begun, the message would be another.
    header = path.getvalue()[:60]
    with pytest.raises(ImageError, match=r"too many pixels(?s:.*)1000 x 1000(?s:.*)at most 999999"):
        load_image(header, limit_pixels=999_999)
    assert load_image(path.getvalue(), limit_pixels=1_000_000).size == (1000, 1000)


@pytest.mark.parametrize(("side", "accepted"), [(9, True), (11, True), (14, True), (15, False)])
def test_pillows_own_limit_is_an_image_error_and_its_warning_stays_inside(
    side: int, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    Image.new("RGB", (side, side)).save(content, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 98)  # warns from 99 pixels on, refuses from 197
    if accepted:
        assert load_image(content.getvalue()).size == (side, side)
    else:
        with pytest.raises(ImageError, match="too many pixels"):
            load_image(content.getvalue())


def test_eps_is_not_handed_to_ghostscript() -> None:
    content = io.BytesIO()
    scene().save(content, "EPS")
    with pytest.raises(ImageError, match="of no known format"):
        load_image(content.getvalue())


def test_threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    path = save(scene(), tmp_path / "a.png")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(path) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
