"""MMBench (https://github.com/open-compass/MMBench): tab-separated, the image in base64 in each row.

``index`` counts questions; 1,000,000 more is the same question with its options moved on by one. All of them form a
group, so that group accuracy is the benchmark's CircularEval. A short number in place of an image is the index of the
row that has it.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import sys
from pathlib import Path

from flashvlm_export.evaluation.convert.common import (
    LETTER_ANSWER,
    Converted,
    Source,
    no_answers,
    not_published,
    read_bytes,
    with_options,
)
from flashvlm_export.evaluation.dataset import Record
from flashvlm_export.files import atomic_write, storage_errors

_NEEDED = ("index", "question", "A", "B", "image")
_ROTATION = 1_000_000
_LONGEST_REFERENCE = 64
_ENDINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}


def convert(source: Source) -> Converted:
    """Return one record per row, metric ``choice``; the images are written to ``images``."""
    rows = _rows(source.questions)
    if not all(_cell(row, "answer") for row in rows):
        raise no_answers(source.questions)
    folder = source.folder()
    images = {row["index"]: row["image"] for row in rows}
    files: dict[str, Path] = {}
    converted = Converted()
    for row in rows:
        index = row["index"]
        encoded = row["image"] if len(row["image"]) > _LONGEST_REFERENCE else images.get(row["image"], "")
        if encoded not in files:
            files[encoded] = _write_image(source.questions, folder, index, encoded)
        options = [option for option in (_cell(row, letter) for letter in "ABCD") if option]
        hint = _cell(row, "hint")
        question = with_options(f"{hint}\n{row['question']}" if hint else row["question"], options)
        converted.add(
            Record(
                index,
                source.relative(files[encoded]),
                source.ask(question, LETTER_ANSWER),
                [_cell(row, "answer")],
                source.kind or "mmbench",
                "choice",
                options,
                str(int(index) % _ROTATION),
            )
        )
    return converted


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        text = read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise not_published(file, str(error)) from error
    before = csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        raise not_published(file, str(error)) from error
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows, start=1):
        missing = [name for name in _NEEDED if not row.get(name)]
        if missing or not row["index"].isdecimal():
            raise not_published(file, f"row {number} has no {', '.join(missing) or 'index that is a number'}")
    return rows


def _cell(row: dict[str, str], name: str) -> str:
    """Return a cell's text; empty ones are also written as ``nan``."""
    text = (row.get(name) or "").strip()
    return "" if text.lower() == "nan" else text


def _write_image(file: Path, folder: Path, index: str, encoded: str) -> Path:
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise not_published(file, f"the image of index {index} is not base64: {error}") from error
    ending = next((ending for magic, ending in _ENDINGS.items() if content.startswith(magic)), None)
    if ending is None:
        raise not_published(file, f"the image of index {index} is no JPEG, PNG, WebP or GIF")
    path = folder / f"{index}{ending}"
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != content:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    return path
