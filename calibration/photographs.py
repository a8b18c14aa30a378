"""Where calibration images and prompts come from: a folder, a text file, or what Python packages bring along."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from flashvlm_export.calibration.samples import spread
from flashvlm_export.errors import ImageError, PromptError, UsageError
from flashvlm_export.progress import Progress

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))

#: Asked in turn where no prompts are given.
DEFAULT_PROMPTS = (
    "What is in the picture?",
    "Describe the image in detail.",
    "What colour is the largest object?",
    "How many people are there?",
    "Is there any text, and what does it say?",
    "What is on the left side?",
    "Where was this photograph taken?",
    "What is unusual about this image?",
)

# Photographs among the samples of scikit-learn and scikit-image; the rest of theirs are textures and drawings.
_PACKAGED = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": tuple(
        f"data/{name}"
        for name in (
            "astronaut.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
            "page.png",
            "rocket.jpg",
        )
    ),
}


def packaged_photographs() -> list[Path]:
    """Return the photographs inside scikit-learn and scikit-image; neither is imported.

    Raises:
        UsageError: if neither is installed.
    """
    found = []
    for package, names in _PACKAGED.items():
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            found += [Path(folder, name) for name in names if Path(folder, name).is_file()]
    if not found:
        raise UsageError(
            "there are no photographs at hand to calibrate with",
            expected="--images DIR, or the samples of scikit-learn or scikit-image",
            hint="give photographs like those that the model will see: --images DIR; "
            "or: pip install scikit-learn scikit-image",
        )
    return found


def images_in(folder: Path, most: int) -> list[Path]:
    """Return the images in ``folder`` and below it, sorted by path; of more than ``most``, as many spread evenly.

    Hidden files and files of other types are passed over.

    Raises:
        UsageError: if there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UsageError(
            "there is no such image folder",
            received=f"{folder} ({'a file' if folder.exists() else 'does not exist'})",
            expected="a directory of photographs",
        )
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    images = [path for path in names if path.suffix.lower() in SUFFIXES]
    if not images:
        raise UsageError(
            "there are no images in the folder",
            received=f"{folder}: {len(files)} file(s), none of them an image",
            expected=f"files that end in {', '.join(sorted(SUFFIXES))}",
            hint="some dozen photographs like those that the model will see are enough",
        )
    return spread(images, most)


def readable(
    images: Sequence[Path], check: Callable[[Path], object], *, skip_bad: bool, progress: Progress
) -> tuple[list[Path], list[str]]:
    """Return the images that ``check`` accepts, and why each of the others is left out.

    Args:
        images: files.
        check: raises :class:`ImageError` for what cannot be read.
        skip_bad: leave such files out instead of raising.
        progress: shows a bar.

    Raises:
        ImageError: naming every bad file, unless ``skip_bad``; or if none is left.
    """
    reasons = {path: _why_bad(path, check) for path in progress.track(images, "images")}
    good = [path for path, reason in reasons.items() if reason is None]
    bad = [f"{path.name}: {reason}" for path, reason in reasons.items() if reason is not None]
    if bad and not (skip_bad and good):
        raise ImageError(
            f"{len(bad)} of {len(images)} images cannot be read",
            received="\n            ".join(bad),
            expected="whole images",
            hint="mend or remove them" + (", or leave them out: --skip-bad" if good else ""),
        )
    return good, bad


def read_prompts(file: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, one prompt each.

    Raises:
        UsageError: if the file cannot be read.
        PromptError: if it is empty, or a line is.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            "the prompt file cannot be read", received=f"{file}: {reason}", expected="UTF-8 text, one prompt per line"
        ) from error
    empty = [str(number) for number, line in enumerate(lines, start=1) if not line.strip()]
    if empty or not lines:
        raise PromptError(
            "the prompt file has empty lines" if lines else "the prompt file is empty",
            received=f"{file}" + (f", line {', '.join(empty[:10])}" if empty else ""),
            expected="one prompt per line",
            hint="remove the empty lines",
        )
    return [line.strip() for line in lines]


def _why_bad(path: Path, check: Callable[[Path], object]) -> str | None:
    try:
        check(path)
    except ImageError as error:
        return error.what
    return None
