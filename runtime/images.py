"""Reading an image safely, and as the checkpoint's own processor reads it.

The pixels equal those of ``transformers.image_utils.load_image``: turned upright by EXIF, first frame of an animation,
converted to RGB by Pillow (alpha is dropped, not blended; no ICC transform). One deliberate difference: a greyscale
image with more than 8 bits. Pillow clips each value at 255, so that a 16-bit scan comes out white; here its upper byte
is taken, as Pillow itself does for 16-bit colour. Where all values fit in 8 bits the two agree and nothing is changed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import threading
import warnings
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from flashvlm_export.errors import ImageError
from flashvlm_export.files import sha256_of

#: Pillow's own limit, beyond which transformers cannot open an image either: 715 MB once decoded (4 bytes per pixel).
LIMIT_PIXELS = 178_956_970

# Pillow hands EPS to Ghostscript, a program that interprets the file.
_REFUSED_FORMATS = frozenset({"EPS"})
_EXIF_ORIENTATION = 0x0112
_WHAT_TO_DO = "convert it to PNG or JPEG and try again; a video is shown by --video, or read_video"

# warnings.catch_warnings changes the whole process; two of them at a time could leave a filter behind.
_opening = threading.Lock()


#: What :func:`load_image` reads.
ImageSource = Union[str, "os.PathLike[str]", bytes, Image.Image, npt.NDArray[Any]]


def load_image(
    source: ImageSource, *, limit_pixels: int = LIMIT_PIXELS, formats: Collection[str] | None = None
) -> Image.Image:
    """Return an image as 8-bit RGB, upright.

    Args:
        source: a path, a ``data:image/...;base64,`` URL, an encoded file as bytes, a Pillow image, or a ``uint8``
            array ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGBA). URLs are not fetched.
        limit_pixels: largest width x height, checked before anything is decoded. Beyond 178,956,970 Pillow's
            ``PIL.Image.MAX_IMAGE_PIXELS`` has to be raised too.
        formats: Pillow's names of the file formats that are read; ``None`` for all but EPS.

    Returns:
        A Pillow image of mode ``RGB``; ``source`` itself if it is one already. ``source`` is never changed.

    Raises:
        ImageError: if there is no image, it cannot be decoded completely, or it has too many pixels.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image given", limit_pixels)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the array given", limit_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(BytesIO(source), f"{len(source)} bytes", limit_pixels, formats)
    if isinstance(source, str) and source.startswith("data:"):
        return _decode(BytesIO(data_url_bytes(source)), "a data URL", limit_pixels, formats)
    if isinstance(source, (str, os.PathLike)):
        path = _checked_path(source)
        try:
            with path.open("rb") as stream:
                return _decode(stream, str(path), limit_pixels, formats)
        except OSError as error:
            raise ImageError("the image file cannot be read", received=f"{path}: {error.strerror or error}") from error
    raise _no_source(source)


def content_key(source: ImageSource) -> str:
    """Return a hash of what ``source`` holds: sources with equal keys are the same image. Files are not decoded.

    A file and its bytes have one key; an array and a Pillow image of the same pixels have keys of their own.

    Raises:
        ImageError: if ``source`` is nothing that :func:`load_image` reads, or cannot be read.
    """
    digest = hashlib.sha256()
    if isinstance(source, Image.Image):
        pixels = load_image(source)
        digest.update(f"{pixels.size}".encode())
        digest.update(pixels.tobytes())
    elif isinstance(source, np.ndarray):
        digest.update(f"{source.dtype} {source.shape}".encode())
        digest.update(np.ascontiguousarray(source).data)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        digest.update(source)
    elif isinstance(source, str) and source.startswith("data:"):
        digest.update(data_url_bytes(source))
    elif isinstance(source, (str, os.PathLike)):
        path = _checked_path(source)
        try:
            return sha256_of(path)
        except OSError as error:
            raise ImageError("the image file cannot be read", received=f"{path}: {error.strerror or error}") from error
    else:
        raise _no_source(source)
    return digest.hexdigest()


def _no_source(source: object) -> ImageError:
    return ImageError(
        "this is not something an image can be read from",
        received=type(source).__name__,
        expected="a path, bytes, a PIL image or a uint8 array",
    )


def _checked_path(source: str | os.PathLike[str]) -> Path:
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(
            "images are not fetched from the network",
            received=source,
            expected="a file on this machine",
            hint="download it first, for example: curl -O URL",
        )
    path = Path(source)
    try:
        problem = (
            None
            if path.is_file()
            else "a directory"
            if path.is_dir()
            else "not a regular file"
            if path.exists()
            else "no such file"
        )
    except (OSError, ValueError) as error:  # not allowed to look; a name too long, or with a null character
        problem = str(error)
    if problem:
        raise ImageError("there is no image file at this path", received=f"{str(path)!r}: {problem}")
    return path


def data_url_bytes(url: str) -> bytes:
    """Return the file inside a ``data:image/...;base64,`` URL; raises :class:`ImageError` if it has no such form."""
    header, _, payload = url.partition(",")
    try:
        if not (header.lower().startswith("data:image/") and header.lower().endswith(";base64")):
            raise ValueError("no image in base64")
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            "the data URL holds no image",
            received=f"{url[:40]}...: {error}",
            expected="data:image/png;base64,... or another image type",
        ) from None


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    channels_fit = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not channels_fit or array.size == 0:
        raise ImageError(
            "the array is not an image",
            received=f"{array.dtype} {list(array.shape)}",
            expected="uint8 [height, width], or with 1, 3 or 4 channels last",
            hint="scale floats to 0..255 and cast; move channels last with numpy.moveaxis(array, 0, -1)",
        )
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2:] == (1,) else array))


def _decode(stream: BinaryIO, name: str, limit_pixels: int, formats: Collection[str] | None) -> Image.Image:
    if not stream.read(1):
        raise ImageError("the image file is empty", received=name)
    stream.seek(0)
    with _open(stream, name, limit_pixels, formats) as image:
        return _to_rgb(image, name, limit_pixels)


def _open(stream: BinaryIO, name: str, limit_pixels: int, wanted: Collection[str] | None) -> Image.Image:
    """Read the header only."""
    Image.init()
    formats = [format for format in Image.ID if format in (wanted or Image.ID) and format not in _REFUSED_FORMATS]
    try:
        with _opening, warnings.catch_warnings():
            # limit_pixels decides, not Pillow's warning at half of its own limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(stream, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(
            "the image has too many pixels",
            received=f"{name}: {error}",
            expected=f"at most {limit_pixels} pixels",
            hint="scale it down first",
        ) from error
    except Exception as error:  # damaged headers make Pillow's plugins raise almost anything
        raise ImageError(
            "this is not an image that can be read",
            received=f"{name}: {'of no known format' if isinstance(error, UnidentifiedImageError) else error}",
            expected=", ".join(wanted)
            if wanted
            else "PNG, JPEG, WebP, GIF, BMP, TIFF, or another format that Pillow reads",
            hint=_WHAT_TO_DO,
        ) from error


def _to_rgb(image: Image.Image, name: str, limit_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > limit_pixels:
        raise ImageError(
            "the image has too many pixels",
            received=f"{name}: {width} x {height} = {width * height} pixels",
            expected=f"at most {limit_pixels} pixels",
            hint="scale it down first",
        )
    if width * height == 0:
        raise ImageError("the image is empty", received=f"{name}: {width} x {height} pixels")
    try:
        image.load()
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = _to_8_bit(image, name)
        if isinstance(image.info.get("transparency"), bytes):
            # One alpha per palette entry: of no use in RGB, and Pillow would warn of that.
            image = image.copy()
            del image.info["transparency"]
        return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # damaged pixels make Pillow's decoders raise almost anything
        raise ImageError(
            "the image cannot be decoded completely",
            received=f"{name}: {error or type(error).__name__}",
            expected="a whole file",
            hint="it may be cut off or damaged: copy it again, or " + _WHAT_TO_DO,
        ) from error


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Return greyscale of 16 or 32 bits as one that converts to RGB without clipping."""
    levels = np.asarray(image)
    low, high = levels.min(), levels.max()
    if low >= 0 and high <= 255:
        return image
    if levels.dtype.kind == "f" or low < 0 or high > 65535:
        raise ImageError(
            "the image's levels have no defined black and white",
            received=f"{name}: mode {image.mode}, levels from {low} to {high}",
            expected="8 or 16 bits per channel",
            hint="scale it to 8 bits first",
        )
    return Image.fromarray((levels >> 8).astype(np.uint8))
