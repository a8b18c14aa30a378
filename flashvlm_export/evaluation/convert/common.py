"""What the formats share: reading published files, naming images, putting options and instructions under a question."""

from __future__ import annotations

import os
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from flashvlm_export.errors import DatasetError, UsageError
from flashvlm_export.evaluation.dataset import Record
from flashvlm_export.files import atomic_write

T = TypeVar("T")

# What LLaVA-1.5 was trained and evaluated with (arXiv 2310.03744); its answers are short only with them.
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Source:
    """What the user gave; see ``flashvlm dataset``."""

    questions: Path
    output: Path
    annotations: Path | None = None
    images: Path | None = None
    split: str = "test"
    kind: str | None = None
    instruction: str | None = None

    def image(self, *names: str) -> str:
        """Return the path of an image below ``images``, relative to the data set's folder."""
        return self.relative(self.folder().joinpath(*names))

    def folder(self) -> Path:
        """Return ``images``; raise :class:`UsageError` if it is not given."""
        if self.images is None:
            raise UsageError("this format needs a folder for images", expected="--images DIR")
        return self.images

    def relative(self, file: Path) -> str:
        """Return ``file`` as seen from the data set's folder."""
        return Path(os.path.relpath(file.resolve(), self.output.parent.resolve())).as_posix()

    def ask(self, question: str, instruction: str) -> str:
        """Return the question with the instruction below it: the user's, where there is one."""
        last = instruction if self.instruction is None else self.instruction
        return f"{question.strip()}\n{last}" if last else question.strip()


@dataclass
class Converted:
    """Records with the words that name their place, and why others were left out."""

    records: list[tuple[str, Record]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Add a record; its place in messages is its id."""
        self.records.append((f"question {record.id}", record))


def read_json(path: Path, kind: type[T]) -> T:
    """Return the JSON in ``path``; fields that ``kind`` does not have are passed over.

    Raises:
        UsageError: if the file cannot be read.
        DatasetError: if it is not of the published structure, naming the place.
    """
    try:
        return msgspec.json.decode(read_bytes(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise not_published(path, str(error)) from error


def read_bytes(path: Path) -> bytes:
    """Return what is in ``path``; raise :class:`UsageError` if it cannot be read."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UsageError(
            "the published file cannot be read",
            received=f"{path}: {error.strerror or error}",
            expected="a file of your copy of the benchmark",
        ) from error


def not_published(path: Path, why: str) -> DatasetError:
    """Return the error for a file that is not of its format."""
    return DatasetError(
        "the file is not of the published format",
        received=f"{path}: {why}",
        expected="the file as its authors publish it",
        hint="see FORMAT in flashvlm dataset --help for the file that belongs to each format",
    )


def no_answers(path: Path) -> DatasetError:
    """Return the error for a file of a split whose answers are not published."""
    return DatasetError(
        "the file has questions without answers",
        received=path,
        expected="a split whose answers are published",
        hint="test splits are for the benchmark's own server; take the validation (dev, testdev) split",
    )


def with_options(question: str, options: Sequence[str]) -> str:
    """Return the question with its options below it, one per line, by letter."""
    letters = string.ascii_uppercase[: len(options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return "\n".join([question.strip(), *lines])


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write one record per line, atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        for record in records:
            stream.write(msgspec.json.encode(record) + b"\n")
