from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.errors import BundleError, ConfigError, ImageError
from flashvlm_export.preprocessor import PreprocessorSettings, decode_preprocessor, encode_preprocessor
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.preprocess import ImagePreprocessor

ORACLE = "the oracle is transformers' own image processor"
LLAVA_15 = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}


OWN_SIZE = {"image_processor_type": "Qwen2VLImageProcessor"}
TILES = {"image_processor_type": "LlavaNextImageProcessor"}


def photographs() -> Iterator[Image.Image]:
    """Real photographs, whole and cut to odd sizes, larger and smaller than 336 pixels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="photographs come with scikit-learn")
    skimage = pytest.importorskip("skimage.data", reason="photographs come with scikit-image")
    arrays = [
        *datasets.load_sample_images().images,
        *(getattr(skimage, name)() for name in ("cat", "coffee", "astronaut", "rocket", "camera", "coins")),
    ]
    rng = np.random.default_rng(0)
    for array in arrays:
        yield load_image(array)
        for _ in range(3):
            height, width = rng.integers(20, np.array(array.shape[:2]) + 1)
            top, left = rng.integers(0, np.array(array.shape[:2]) - [height, width] + 1)
            yield load_image(np.ascontiguousarray(array[top : top + height, left : left + width]))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 7919 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def oracle(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    kind = config.get("image_processor_type", "CLIPImageProcessor")
    return getattr(transformers, f"{kind}Pil").from_dict(config)


def assert_equal_to_oracle(config: dict[str, Any], images: list[Image.Image]) -> None:
    processor = oracle(config)
    preprocessor = ImagePreprocessor(PreprocessorSettings.from_hf(config))
    for image in images:
        expected = processor(image, return_tensors="np")["pixel_values"]
        expected = expected[0] if expected.ndim == 5 else expected  # overview and tiles of the one image
        actual = preprocessor([image])
        assert actual.dtype == np.float32
        assert actual.flags.c_contiguous
        np.testing.assert_array_equal(actual, expected)


def test_photographs_equal_transformers_bit_for_bit() -> None:
    assert_equal_to_oracle(LLAVA_15, list(photographs()))


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (1, 2), (2, 1), (336, 336), (335, 337), (337, 335), (672, 336), (20_000, 100), (100, 20_000), (13, 900)],
)
def test_unusual_sizes_equal_transformers(width: int, height: int) -> None:
    assert_equal_to_oracle(LLAVA_15, [noise(width, height)])


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 30, "crop_size": 30},
        {"size": {"height": 41, "width": 29}, "crop_size": {"height": 23, "width": 17}},
        {"size": {"height": 41, "width": 29}, "do_center_crop": False},
        {"size": [41, 29], "do_center_crop": False},
        {"size": 31, "default_to_square": True, "do_center_crop": False},
        {"size": {"shortest_edge": 20}, "crop_size": 33},  # too small for the crop: filled with zeros
        {"size": {"shortest_edge": 21}, "crop_size": {"height": 50, "width": 10}},
        {"size": {"shortest_edge": 60}, "crop_size": {"height": 31, "width": 32}},
        {"do_resize": False, "crop_size": 51},
        {"do_resize": False, "crop_size": 500},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 0.0078431},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"do_resize": None, "do_rescale": None, "do_normalize": None},  # null switches a step off
        {"do_resize": False, "size": None, "do_normalize": False, "do_pad": None},
        *({"resample": value, "size": 40, "crop_size": 33} for value in range(6)),
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": 40, "crop_size": 40},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": 40, "do_center_crop": False},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False, "do_resize": False},
        {"image_processor_type": "LlavaImageProcessor"},
        {"image_processor_type": "LlavaNextImageProcessor"},
        {"image_processor_type": "LlavaNextImageProcessor", "size": {"height": 336, "width": 336}, "do_pad": False},
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": 30,
            "crop_size": 30,
            "image_grid_pinpoints": [[30, 60]],
        },
        {"image_processor_type": "LlavaNextImageProcessor", "do_center_crop": False, "resample": 2},
    ],
    ids=str,
)
def test_settings_equal_transformers(changes: dict[str, Any]) -> None:
    assert_equal_to_oracle(LLAVA_15 | changes, [noise(97, 61), noise(61, 97), noise(40, 40), noise(33, 500)])


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor"])
def test_missing_keys_take_the_defaults_of_transformers(kind: str) -> None:
    assert_equal_to_oracle({"image_processor_type": kind}, [noise(300, 250)])


@pytest.mark.parametrize(
    "changes",
    [{}, {"min_pixels": 20000, "max_pixels": 30000}, {"size": {"shortest_edge": 5000, "longest_edge": 9000}}],
    ids=str,
)
@pytest.mark.parametrize("size", [(97, 61), (640, 480), (1, 1), (14, 42), (70, 70), (13, 2600), (1500, 1100)])
def test_own_sizes_are_those_of_transformers(changes: dict[str, Any], size: tuple[int, int]) -> None:
    """Qwen2-VL's processor returns patches; here the picture that they are cut from is compared."""
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    config = LLAVA_15 | OWN_SIZE | changes
    config.pop("size") if "size" not in changes else None
    given = transformers.Qwen2VLImageProcessorPil.from_dict(config)(noise(*size), return_tensors="np")
    _, rows, columns = given["image_grid_thw"][0]
    patches = given["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    expected = patches[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)
    have = ImagePreprocessor(PreprocessorSettings.from_hf(config))([noise(*size)])
    np.testing.assert_array_equal(have[0], expected)


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (336, 336), (50, 41)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
        {"do_center_crop": False, "size": {"height": 100, "width": 150}},
        {"size": {"shortest_edge": 200}},
        TILES,
        OWN_SIZE,
    ],
)
def test_view_box_is_where_the_encoder_looks(changes: dict[str, Any], size: tuple[int, int]) -> None:
    """The levels of a ramp tell where in the picture a pixel of the view comes from."""
    ramp_x, ramp_y = np.meshgrid(*(50 + 200 * (np.arange(side) + 0.5) / side for side in size))
    picture = Image.fromarray(np.stack([ramp_x, ramp_y, np.full_like(ramp_x, 255)], axis=2).round().astype(np.uint8))
    preprocess = ImagePreprocessor(PreprocessorSettings.from_hf({**LLAVA_15, **changes}))
    left, top, right, bottom = preprocess.view_box(size)
    view = np.asarray(preprocess.view(picture)).astype(float)
    rows, columns = view.shape[:2]
    inside = view[:, :, 2] > 250  # what the picture is padded with is darker
    ys, xs = np.nonzero(inside)
    seen_x = (view[ys, xs, 0] - 50) / 200
    seen_y = (view[ys, xs, 1] - 50) / 200
    # Where the middle of a pixel of the view lies, by the box.
    at_x = left + (xs + 0.5) / columns * (right - left)
    at_y = top + (ys + 0.5) / rows * (bottom - top)
    # Two pixels of the smaller of picture and view, as far as resizing mixes padding in, and rounding to levels.
    tolerance = 2 / min(*size, rows, columns) + 2 / 200
    assert np.abs(seen_x - at_x).max() < tolerance
    assert np.abs(seen_y - at_y).max() < tolerance
    assert inside.all() == (left >= 0 and top >= 0)


def test_batch_is_each_image_on_its_own() -> None:
    preprocessor = ImagePreprocessor(PreprocessorSettings.from_hf({"size": 24, "crop_size": 24}))
    images = [noise(50, 40), noise(24, 24), noise(30, 90)]
    batch = preprocessor(images)
    assert batch.shape == (3, 3, 24, 24)
    for image, pixel_values in zip(images, batch, strict=True):
        np.testing.assert_array_equal(preprocessor([image])[0], pixel_values)


def test_values_by_hand() -> None:
    settings = PreprocessorSettings.from_hf({"size": 2, "crop_size": 2, "image_mean": [0, 0.5, 1], "image_std": 0.5})
    pixel_values = ImagePreprocessor(settings)([Image.new("RGB", (4, 2), (255, 0, 51))])
    np.testing.assert_allclose(pixel_values[0, :, 0, 0], [2.0, -1.0, -1.6], rtol=1e-6)


def test_too_long_and_thin_is_refused_before_it_takes_gigabytes() -> None:
    preprocessor = ImagePreprocessor(PreprocessorSettings.from_hf(LLAVA_15))
    for size in ((20_000, 1), (1, 20_000)):
        with pytest.raises(ImageError, match="too long and thin") as caught:
            preprocessor([noise(*size)])
        assert "1585 times as long as wide" in caught.value.expected
    padding = PreprocessorSettings.from_hf(LLAVA_15 | {"image_processor_type": "LlavaImageProcessor", "do_pad": True})
    with pytest.raises(ImageError, match="padded to a square"):
        ImagePreprocessor(padding)([noise(20_000, 10)])


def test_only_rgb_is_taken() -> None:
    with pytest.raises(ImageError, match="not RGB"):
        ImagePreprocessor(PreprocessorSettings.from_hf({}))([Image.new("L", (5, 5))])


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("image_processor_type", {"image_processor_type": "SiglipImageProcessor"}),
        ("do_resize", OWN_SIZE | {"do_resize": False}),
        ("min_pixels", OWN_SIZE | {"min_pixels": -1}),
        ("max_pixels", OWN_SIZE | {"max_pixels": 700}),
        ("max_pixels", OWN_SIZE | {"min_pixels": 9000, "max_pixels": 8000}),
        ("crop_size", TILES | {"crop_size": 224}),
        ("image_grid_pinpoints", TILES | {"image_grid_pinpoints": []}),
        ("image_grid_pinpoints", TILES | {"image_grid_pinpoints": [[336]]}),
        ("do_pad", {"do_pad": True}),
        ("size", {"size": {"longest_edge": 336}}),
        ("size", {"size": {"shortest_edge": 336, "longest_edge": 672}}),
        ("size", {"size": {"height": 336}}),
        ("size", {"size": 0}),
        ("size", {"size": "336"}),
        ("size", {"size": None}),
        ("rescale_factor", {"rescale_factor": None}),
        ("image_std", {"image_std": None}),
        ("size", {"size": True}),
        ("crop_size", {"crop_size": {"shortest_edge": 336}}),
        ("crop_size", {"crop_size": 10**9}),
        ("do_center_crop", {"do_center_crop": False}),
        ("do_resize", {"do_resize": "yes"}),
        ("resample", {"resample": 6}),
        ("resample", {"resample": "bicubic"}),
        ("rescale_factor", {"rescale_factor": float("nan")}),
        ("image_mean", {"image_mean": [0.5, 0.5]}),
        ("image_std", {"image_std": [0.5, 0.5, 0.0]}),
        ("data_format", {"data_format": "channels_last"}),
    ],
    ids=str,
)
def test_what_cannot_be_reproduced_is_refused_by_name(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`") as caught:
        PreprocessorSettings.from_hf(LLAVA_15 | changes)
    assert caught.value.received
    assert caught.value.expected


def test_processor_config_with_nested_image_processor() -> None:
    nested = {"processor_class": "LlavaProcessor", "image_processor": LLAVA_15}
    assert PreprocessorSettings.from_hf(nested) == PreprocessorSettings.from_hf(LLAVA_15)


@pytest.mark.parametrize(
    "config", [LLAVA_15, LLAVA_15 | TILES, {"size": [41, 29], "do_center_crop": False, "do_normalize": False}]
)
def test_settings_survive_the_file(config: dict[str, Any]) -> None:
    settings = PreprocessorSettings.from_hf(config)
    assert decode_preprocessor(encode_preprocessor(settings)) == settings


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"\xff" + text,
        lambda text: b"{}",
        lambda text: text.replace(b'"resample": 3', b'"resample": 9'),
        lambda text: text.replace(b'"resample": 3', b'"resample": "3"'),
        lambda text: text.replace(b'"shortest_edge": 336', b'"shortest_edge": -1'),
        lambda text: text.replace(b'"shortest_edge": 336', b'"shortest_edge": 99999999'),
    ],
)
def test_damaged_file_is_a_bundle_error(edit: Any) -> None:
    content = edit(encode_preprocessor(PreprocessorSettings.from_hf(LLAVA_15)))
    with pytest.raises(BundleError, match=r"preprocessor\.json is damaged"):
        decode_preprocessor(content)
