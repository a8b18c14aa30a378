"""``preprocessor.json``: how an image becomes ``pixel_values``, as the checkpoint's own image processor does it.

Read from a Hugging Face ``preprocessor_config.json`` when a bundle is written, and by the runtime when it is opened.
The steps are those of transformers' ``CLIPImageProcessorPil``, ``LlavaImageProcessorPil``,
``LlavaNextImageProcessorPil``, ``LlavaOnevisionImageProcessorPil`` and ``Qwen2VLImageProcessorPil``. The torchvision
variants (``CLIPImageProcessor`` where torchvision is installed, ``CLIPImageProcessorFast``) take the same settings but
round their resize differently, so they differ from it, and from this package, by a few grey levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

import msgspec

from flashvlm_export.errors import BundleError, ConfigError
from flashvlm_export.records import encode_record

Triple: TypeAlias = "tuple[float, float, float]"

# Defaults of CLIPImageProcessor; LlavaImageProcessor has the same.
_CLIP_SIDE = 224
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_BICUBIC = 3
_RESAMPLING_FILTERS = range(6)  # PIL.Image.Resampling: nearest, Lanczos, bilinear, bicubic, box, Hamming
_MAX_SIDE = 4096

_CLIP_TYPES = frozenset(
    {"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"}
)
_LLAVA_TYPES = frozenset({"LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil"})
_LLAVA_NEXT_TYPES = frozenset({"LlavaNextImageProcessor", "LlavaNextImageProcessorFast", "LlavaNextImageProcessorPil"})
_ONEVISION_TYPES = frozenset(
    {"LlavaOnevisionImageProcessor", "LlavaOnevisionImageProcessorFast", "LlavaOnevisionImageProcessorPil"}
)
_TILED_TYPES = _LLAVA_NEXT_TYPES | _ONEVISION_TYPES
_QWEN_TYPES = frozenset({"Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"})
_TYPES = _CLIP_TYPES | _LLAVA_TYPES | _TILED_TYPES | _QWEN_TYPES
#: How many times as long as wide an image that keeps its own resolution may be.
LONGEST = 200
_QWEN_PIXELS = (56 * 56, 28 * 28 * 1280)
_LLAVA_NEXT_RESOLUTIONS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_SIDE = 384
_ONEVISION_RESOLUTIONS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


@dataclass(frozen=True)
class PreprocessorSettings:
    """Steps from an RGB image to ``pixel_values``, in the order in which they are done; ``None`` leaves a step out.

    Attributes:
        pad_color: RGB of the border that makes the image square, around its centre.
        shortest_edge: side in pixels that the shorter edge is resized to, keeping the aspect ratio.
        resize: height and width in pixels to resize to; not together with ``shortest_edge``.
        resample: filter of the resize, a value of ``PIL.Image.Resampling``.
        crop: height and width in pixels cut from the centre; what is missing is filled with zeros.
        rescale_factor: multiplies the 8-bit values.
        mean: per channel, subtracted after rescaling.
        std: per channel, divides after ``mean``; both or none.
        pixel_range: a size that both sides of the resized image are multiples of, and the least and most pixels that it
            may have, in which it keeps its aspect ratio; not together with another resize or with a crop.
        resolutions: heights and widths in pixels to which an image can be scaled before it is cut into tiles of
            the size ``resize``, that of the overview; empty where an image is one picture.
        pads_several: whether an image is seen as one picture, padded to a square in the mean colour, where a
            conversation has several.
    """

    pad_color: tuple[int, int, int] | None
    shortest_edge: int | None
    resize: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    resolutions: tuple[tuple[int, int], ...] = ()
    pixel_range: tuple[int, int, int] | None = None
    pads_several: bool = False

    def __post_init__(self) -> None:
        sides = [self.shortest_edge, *(self.resize or ()), *(self.crop or ()), *sum(self.resolutions, ())]
        if any(side is not None and not 1 <= side <= _MAX_SIDE for side in sides):
            raise ValueError(f"sizes have to be 1 to {_MAX_SIDE} pixels, got {sides}")
        if self.shortest_edge is not None and self.resize is not None:
            raise ValueError("shortest_edge and resize exclude each other")
        if self.pixel_range is not None:
            multiple, least, most = self.pixel_range
            if any((self.pad_color, self.shortest_edge, self.resize, self.crop, self.resolutions)):
                raise ValueError("pixel_range goes with no other resize, crop, padding or tiles")
            if not (1 <= multiple <= _MAX_SIDE and 1 <= least <= most and multiple**2 <= most <= _MAX_SIDE**2):
                raise ValueError(f"pixel_range is a multiple, least and most pixels, got {self.pixel_range}")
        elif self.crop is None and self.resize is None:
            raise ValueError("without crop or resize the output size depends on the image")
        tile = self.resize or (1, 1)
        if self.resolutions and (self.resize is None or self.crop is not None or self.pad_color is not None):
            raise ValueError("resolutions need resize, the size of a tile, and neither crop nor pad_color")
        if any(height % tile[0] or width % tile[1] for height, width in self.resolutions):
            raise ValueError(f"resolutions have to be made of tiles of {tile}, got {self.resolutions}")
        if self.pads_several and (not self.resolutions or self.mean is None):
            raise ValueError("pads_several needs resolutions, which it does without, and a mean")
        if self.resample not in _RESAMPLING_FILTERS:
            raise ValueError(f"resample has to be 0 to 5, got {self.resample}")
        if self.pad_color is not None and not all(0 <= level <= 255 for level in self.pad_color):
            raise ValueError(f"pad_color has to be 0 to 255 per channel, got {self.pad_color}")
        if (self.mean is None) != (self.std is None) or (self.std is not None and 0 in self.std):
            raise ValueError(f"mean and std go together and std is not 0, got {self.mean}, {self.std}")
        numbers = [self.rescale_factor or 0.0, *(self.mean or ()), *(self.std or ())]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("rescale_factor, mean and std have to be finite")

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of ``pixel_values``, in pixels, where all images have the same."""
        size = self.crop or self.resize
        assert size is not None  # with pixel_range nobody asks; __post_init__ refuses else that both are missing
        return size

    @property
    def most_units(self) -> int:
        """Squares of the multiple of ``pixel_range`` that an image can come to, at most.

        A side is at least one multiple, which lets an image up to ``LONGEST`` times as long as wide exceed few pixels;
        and both sides are rounded up to reach the least.
        """
        assert self.pixel_range is not None
        multiple, least, most = self.pixel_range
        units, least_units = most // multiple**2, -(-least // multiple**2)
        rounded_up = least_units + math.isqrt(least_units * LONGEST) + math.isqrt(least_units // LONGEST) + 3
        return max(units, math.isqrt(units * LONGEST), rounded_up)

    @property
    def of_one_picture(self) -> PreprocessorSettings:
        """The same without tiles, as a frame of a video is seen."""
        return replace(self, resolutions=(), pads_several=False)

    @property
    def of_several(self) -> PreprocessorSettings:
        """The same for an image that is one of several in a conversation."""
        if not self.pads_several:
            return self
        assert self.mean is not None  # __post_init__ refuses that it is missing
        red, green, blue = (int(255 * value) for value in self.mean)
        return replace(self.of_one_picture, pad_color=(red, green, blue))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> PreprocessorSettings:
        """Return the settings that a Hugging Face image processor would run with.

        Args:
            config: content of ``preprocessor_config.json``, or of ``processor_config.json`` with the same under
                ``image_processor``. A missing key takes the default of ``CLIPImageProcessor``; ``null`` switches a step
            off, and is refused where a step needs the value.

        Raises:
            ConfigError: naming the key whose value this package cannot reproduce exactly.
        """
        nested = config.get("image_processor")
        return _from_hf(nested if isinstance(nested, Mapping) else config)


def encode_preprocessor(settings: PreprocessorSettings) -> bytes:
    """Return ``settings`` as indented JSON; floats keep every bit."""
    return encode_record(settings)


def decode_preprocessor(content: bytes) -> PreprocessorSettings:
    """Return the settings in ``content``; raise :class:`BundleError` if it holds none, or impossible ones."""
    try:
        return msgspec.json.decode(content, type=PreprocessorSettings)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            "preprocessor.json is damaged",
            received=str(error),
            hint="copy it again from where it is whole, or export it again: "
            "flashvlm export MODEL --output BUNDLE --overwrite",
        ) from error


def _from_hf(config: Mapping[str, Any]) -> PreprocessorSettings:
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
    if kind not in _TYPES:
        raise _refused("image_processor_type", kind, f"one of {', '.join(sorted(_TYPES))}")
    if config.get("data_format") not in (None, "channels_first", "ChannelDimension.FIRST"):
        raise _refused("data_format", config["data_format"], "channels_first")

    pad_color = None
    if kind not in _TILED_TYPES and _flag(config, "do_pad", False):  # there, pads a batch to the most tiles
        if kind not in _LLAVA_TYPES:
            raise _refused("do_pad", True, f"false for {kind}: it pads a batch to its largest image")
        mean = _triple(config, "image_mean", _CLIP_MEAN)
        pad_color = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))
        if not all(0 <= level <= 255 for level in pad_color):
            raise _refused("image_mean", mean, "0 to 1 per channel, where do_pad makes it a colour")

    shortest_edge: int | None = None
    resize: tuple[int, int] | None = None
    resample = _BICUBIC
    pixel_range = _pixel_range(config) if kind in _QWEN_TYPES else None
    if _flag(config, "do_resize", True):
        if pixel_range is None:
            side = _ONEVISION_SIDE if kind in _ONEVISION_TYPES else _CLIP_SIDE
            shortest_edge, resize = _resize(config, {"shortest_edge": side})
        resample = config.get("resample", _BICUBIC)
        if not isinstance(resample, int) or isinstance(resample, bool) or resample not in _RESAMPLING_FILTERS:
            raise _refused("resample", resample, "0 to 5, a filter of PIL.Image.Resampling")
    crops = kind not in _QWEN_TYPES and _flag(config, "do_center_crop", kind not in _ONEVISION_TYPES)
    crop = _crop(config) if crops else None
    resolutions: tuple[tuple[int, int], ...] = ()
    if kind in _TILED_TYPES:
        usual = _LLAVA_NEXT_RESOLUTIONS if kind in _LLAVA_NEXT_TYPES else _ONEVISION_RESOLUTIONS
        resolutions = _resolutions(config.get("image_grid_pinpoints", usual))
        if shortest_edge is not None:
            resize, shortest_edge = (shortest_edge, shortest_edge), None
        # Tiles are made in the size of the crop; of that of the resize too, neither changes them any more.
        if resize is None or crop not in (None, resize):
            raise _refused("crop_size", crop, f"the same as `size`, {resize}")
        crop = None
    if crop is None and resize is None and pixel_range is None:
        # Padded to a square first, the shorter edge is both edges.
        if pad_color is None or shortest_edge is None:
            raise _refused("do_center_crop", False, "true, unless `size` gives a height and a width")
        resize = (shortest_edge, shortest_edge)
        shortest_edge = None

    rescale: float | None = None
    normalize: tuple[Triple, Triple] | None = None
    if _flag(config, "do_rescale", True):
        rescale = config.get("rescale_factor", 1 / 255)
        if not _is_number(rescale):
            raise _refused("rescale_factor", rescale, "a finite number")
    if _flag(config, "do_normalize", True):
        normalize = (_triple(config, "image_mean", _CLIP_MEAN), _triple(config, "image_std", _CLIP_STD))
        if 0 in normalize[1]:
            raise _refused("image_std", normalize[1], "numbers other than 0")
    return PreprocessorSettings(
        pad_color=pad_color,
        shortest_edge=shortest_edge,
        resize=resize,
        resample=resample,
        crop=crop,
        rescale_factor=rescale,
        mean=normalize[0] if normalize else None,
        std=normalize[1] if normalize else None,
        resolutions=resolutions,
        pixel_range=pixel_range,
        pads_several=kind in _ONEVISION_TYPES and normalize is not None,
    )


def _pixel_range(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the multiple, the least and the most pixels of Qwen2-VL's image processor, under old names or new ones."""
    if not _flag(config, "do_resize", True):
        raise _refused("do_resize", False, "true: sides have to be multiples of a visual token's")
    size = config.get("size") or {}
    least = config.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or _QWEN_PIXELS[0]
    most = config.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or _QWEN_PIXELS[1]
    multiple = config.get("patch_size", 14) * config.get("merge_size", 2)
    for key, value in (("min_pixels", least), ("max_pixels", most), ("patch_size", multiple)):
        if not isinstance(value, int) or value < 1:
            raise _refused(key, value, "a whole number, 1 or more")
    if not multiple**2 <= most or not least <= most:
        raise _refused("max_pixels", most, f"at least {max(multiple**2, least)}")
    return multiple, least, min(most, _MAX_SIDE**2)


def _resolutions(value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _refused("image_grid_pinpoints", value, "a list of [height, width]")
    return tuple(_height_width(pair, "image_grid_pinpoints", "[height, width]") for pair in value)


def _resize(config: Mapping[str, Any], usual: Mapping[str, int]) -> tuple[int | None, tuple[int, int] | None]:
    """Return ``shortest_edge`` or ``(height, width)`` of ``size``, in any of its layouts; the other is ``None``."""
    size = config.get("size", usual)
    if _is_side(size):
        square = _flag(config, "default_to_square", False)
        return (None, (size, size)) if square else (size, None)
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if given.keys() == {"shortest_edge"} and _is_side(given["shortest_edge"]):
            return given["shortest_edge"], None
    return None, _height_width(size, "size", 'a side, {"shortest_edge": side} or {"height": side, "width": side}')


def _crop(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config.get("crop_size", _CLIP_SIDE)
    return (size, size) if _is_side(size) else _height_width(size, "crop_size", 'a side or {"height": , "width": }')


def _height_width(size: object, key: str, expected: str) -> tuple[int, int]:
    if isinstance(size, Mapping):
        given = {name: value for name, value in size.items() if value is not None}
        size = (given["height"], given["width"]) if given.keys() == {"height", "width"} else size
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(map(_is_side, size)):
        return size[0], size[1]
    raise _refused(key, size, f"{expected}, 1 to {_MAX_SIDE} pixels each")


def _is_side(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SIDE


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _triple(config: Mapping[str, Any], key: str, default: list[float]) -> Triple:
    value = config.get(key, default)
    if _is_number(value):
        value = [value] * 3
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(_is_number, value)):
        raise _refused(key, value, "a finite number, or three of them: red, green and blue")
    return float(value[0]), float(value[1]), float(value[2])


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise _refused(key, value, "true or false")
    return bool(value)


def _refused(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"the image processor's `{key}` cannot be reproduced exactly",
        received=f"{key} = {value!r}",
        expected=expected,
        hint="only the image processors of CLIP, the LLaVA family and Qwen2.5-VL are supported; see "
        "preprocessor_config.json",
    )
