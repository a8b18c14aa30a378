"""Images to ``pixel_values``, bit for bit as transformers' ``CLIPImageProcessorPil`` and its relatives make them.

Equal because the same things are done in the same precision: Pillow's resize on 8-bit RGB, a crop of 8-bit pixels,
and, since only 256 levels can follow, a table per channel that holds ``(float32(level * factor) - mean) / std``.
Both sides have to run the same Pillow: 13 chooses the order of its two resize passes by size, 12 always takes rows
first, and the 8-bit rounding in between makes single levels differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from flashvlm_export.errors import ImageError
from flashvlm_export.preprocessor import LONGEST, PreprocessorSettings
from flashvlm_export.runtime.images import LIMIT_PIXELS
from flashvlm_export.runtime.layout import Size, choose_resolution, fitted

Pixels = npt.NDArray[np.uint8]


class ImagePreprocessor:
    """Callable from RGB images to one batch.

    Args:
        settings: of the bundle, see :class:`PreprocessorSettings`.
    """

    def __init__(self, settings: PreprocessorSettings) -> None:
        self.settings = settings
        self._levels = _level_table(settings)

    def __call__(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """Return ``pixel_values``: float32 ``[pictures, 3, H, W]``, C-contiguous, owned by the caller.

        A picture for each image; or for each its overview and then its tiles, line by line. Of images that keep their
        own resolution one alone, or several that come to the same.

        Args:
            images: of mode ``RGB``, as :func:`flashvlm_export.runtime.images.load_image` returns them.

        Raises:
            ImageError: if an image is not RGB, or so long and thin that its resized form would not fit in memory.
        """
        pictures = [picture for image in images for picture in self._pictures(image)]
        batch = np.empty((len(pictures), 3, *pictures[0].shape[:2]), np.float32)
        for pixels, rows in zip(pictures, batch, strict=True):
            for channel in range(3):
                # mode="clip" spares the bounds check: an 8-bit level cannot leave a table of 256.
                np.take(self._levels[channel], pixels[:, :, channel], out=rows[channel], mode="clip")
        return batch

    def view(self, image: Image.Image) -> Image.Image:
        """Return what the encoder sees of ``image``, 8-bit RGB: resized and cropped, or as it is where all is seen."""
        whole = self.settings.resolutions or self.settings.pixel_range
        return image if whole else Image.fromarray(next(self._pictures(image)))

    def view_box(self, size: Size) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of what the encoder sees, in fractions of an image of ``size``.

        Outside of 0 to 1 is what the image is padded with.
        """
        settings = self.settings
        if settings.resolutions or settings.pixel_range:
            return 0.0, 0.0, 1.0, 1.0
        side = (max(size),) * 2 if settings.pad_color is not None else size
        resized = self._resized_size(side)
        crop = (resized[1], resized[0]) if settings.crop is None else settings.crop
        ranges = []
        for whole, padded, scaled, shown in zip(size, side, resized, reversed(crop), strict=True):
            first = (scaled - shown) // 2
            ranges.append([(edge / scaled * padded - (padded - whole) // 2) / whole for edge in (first, first + shown)])
        (left, right), (top, bottom) = ranges
        return left, top, right, bottom

    def tiles(self, size: Size) -> Size:
        """Return rows and columns of tiles, besides the overview, of an image of ``size`` (width, height)."""
        height, width = choose_resolution(size, self.settings.resolutions)
        return height // self.settings.output_size[0], width // self.settings.output_size[1]

    def _pictures(self, image: Image.Image) -> Iterator[Pixels]:
        if image.mode != "RGB":
            raise ImageError(
                "the image is not RGB", received=f"mode {image.mode}", expected="an image as load_image returns it"
            )
        yield self._resized_and_cropped(image)
        if self.settings.resolutions:
            yield from self._tiles(image)

    def _tiles(self, image: Image.Image) -> Iterator[Pixels]:
        resolution = choose_resolution(image.size, self.settings.resolutions)
        size = fitted(image.size, resolution)
        pixels = np.asarray(image if size == image.size else image.resize(size, self.settings.resample))
        # Black borders: the larger half of an odd one behind and below.
        canvas = np.zeros((*resolution, 3), np.uint8)
        top, left = (resolution[0] - size[1]) // 2, (resolution[1] - size[0]) // 2
        canvas[top : top + size[1], left : left + size[0]] = pixels
        height, width = self.settings.output_size
        for y in range(0, resolution[0], height):
            for x in range(0, resolution[1], width):
                yield canvas[y : y + height, x : x + width]

    def _resized_and_cropped(self, image: Image.Image) -> Pixels:
        settings = self.settings
        if settings.pad_color is not None:
            image = _pad_to_square(image, settings.pad_color)
        size = self._resized_size(image.size)
        if size != image.size:
            # The whole image, although the crop keeps a part: which of its two passes Pillow does first, and so what
            # is rounded in between, depends on its version and on this size.
            image = image.resize(size, settings.resample)
        return np.asarray(image if settings.crop is None else _centre_crop(image, settings.crop))

    def _resized_size(self, given: Size) -> Size:
        settings = self.settings
        if settings.pixel_range is not None:
            return within_pixels(given, *settings.pixel_range)
        if settings.resize is not None:
            return settings.resize[1], settings.resize[0]
        if settings.shortest_edge is None:
            return given
        short, long = sorted(given)
        new_short, new_long = settings.shortest_edge, int(settings.shortest_edge * long / short)
        if new_short * new_long > LIMIT_PIXELS:
            raise ImageError(
                "the image is too long and thin",
                received=f"{given[0]} x {given[1]}: {new_long} x {new_short} once resized",
                expected=f"at most {LIMIT_PIXELS // new_short**2} times as long as wide",
                hint="crop it to the part that matters",
            )
        return (new_short, new_long) if given[0] <= given[1] else (new_long, new_short)


def within_pixels(size: Size, multiple: int, least: int, most: int) -> Size:
    """Return the (width, height) nearest to ``size``, multiples of ``multiple``, with ``least`` to ``most`` pixels.

    As transformers' ``smart_resize`` of Qwen2-VL.

    Raises:
        ImageError: if one side is more than 200 times the other.
    """
    width, height = size
    if max(size) > LONGEST * min(size):
        raise ImageError(
            "the image is too long and thin",
            received=f"{width} x {height} pixels",
            expected=f"one side at most {LONGEST} times the other",
            hint="crop it to the part that matters",
        )
    sides = [round(side / multiple) * multiple for side in size]
    if sides[0] * sides[1] > most:
        scale = math.sqrt((width * height) / most)
        sides = [max(multiple, math.floor(side / scale / multiple) * multiple) for side in size]
    elif sides[0] * sides[1] < least:
        scale = math.sqrt(least / (width * height))
        sides = [math.ceil(side * scale / multiple) * multiple for side in size]
    return sides[0], sides[1]


def _level_table(settings: PreprocessorSettings) -> npt.NDArray[np.float32]:
    """Return what each of the 256 levels becomes, ``[3, 256]``; the order and precision are transformers'."""
    levels = np.arange(256, dtype=np.float64)
    if settings.rescale_factor is not None:
        levels = levels * settings.rescale_factor
    table = np.repeat(levels.astype(np.float32)[None], 3, axis=0)
    if settings.mean is not None and settings.std is not None:
        mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
        table = (table - mean[:, None]) / std[:, None]
    return np.ascontiguousarray(table)


def _pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    if image.width == image.height:
        return image
    if side * side > LIMIT_PIXELS:
        raise ImageError(
            "the image is too long to be padded to a square",
            received=f"{image.width} x {image.height} pixels",
            expected=f"at most {int(LIMIT_PIXELS**0.5)} pixels long",
            hint="scale it down, or crop it to the part that matters",
        )
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut height and width from the centre; Pillow fills what lies outside of the image with zeros."""
    height, width = size
    # Rounded down, also below zero: of an odd border the larger half comes first, as in transformers.
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
