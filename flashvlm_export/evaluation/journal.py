"""``answers.jsonl``: what the model said, one line per question and budget, appended and never rewritten.

The first line holds the settings that every answer depends on; a directory belongs to one set of them. A line is on the
disk before the next question is asked, so a killed run loses the answer it was at. What is half-written then is cut off
and asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from flashvlm_export.errors import JournalError, StorageError
from flashvlm_export.files import storage_errors

JOURNAL = "answers.jsonl"
# Settings that the bundle's hash covers.
_FOR_PEOPLE = ("model", "selector", "weights_sha256")
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunSettings:
    """What an answer depends on, besides question, image and budget.

    Attributes:
        model: name that was exported; for people.
        bundle_sha256: over the files of the bundle that take part.
        precision: of the visual graph.
        backend: what ran it, such as ``onnxruntime CPUExecutionProvider``.
        max_new_tokens: answers end after this many tokens.
        text_span: text that guides selection.
        positions: of kept visual tokens in the language model.
        selector: that chose the visual tokens; for people, its graph is part of the first hash.
        weights_sha256: of the checkpoint's weights, as the manifest has it: what different selectors have in common.
    """

    model: str
    bundle_sha256: str
    precision: str
    backend: str
    max_new_tokens: int
    text_span: str
    positions: str = "contiguous"
    selector: str = ""
    weights_sha256: str = ""


@dataclass(frozen=True)
class AnswerLine:
    """One answer.

    Attributes:
        question: hash of the question's words and of the image's bytes (see ``evaluate.py``).
        budget: visual tokens that were kept.
        id: of the question when it was asked; for people.
        text: what the model said.
        new_tokens: how long it is.
        finish_reason: ``stop``, or ``length`` where it was cut off.
    """

    question: str
    budget: int
    id: str
    text: str
    new_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class _Header:
    schema_version: int
    settings: RunSettings


class Journal:
    """Answers of one output directory; a context manager that holds the right to write there.

    Args:
        directory: created if it is not there.
        settings: of this run.

    Attributes:
        path: of the file.
        answers: by question hash and budget.
        damaged: lines that could not be read and count as not answered.

    Raises:
        JournalError: if the directory's answers were given under other settings or by a newer version, or another
            process writes there.
        StorageError: if it cannot be written.
    """

    def __init__(self, directory: Path, settings: RunSettings) -> None:
        self.path = directory / JOURNAL
        self.settings = settings
        self.answers: dict[tuple[str, int], AnswerLine] = {}
        self.damaged = 0
        self._descriptor = -1

    def __enter__(self) -> Journal:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, answer: AnswerLine) -> None:
        """Append ``answer``; it is on the disk when this returns."""
        key = answer.question, answer.budget
        # Noted first: Ctrl-C mostly comes while the disk is waited for, when the line is written already.
        self.answers[key] = answer
        try:
            self._append(answer)
        except StorageError:
            del self.answers[key]
            raise

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with storage_errors(self.path):
                os.ftruncate(self._descriptor, len(whole))
        if not whole:
            self._append(_Header(SCHEMA_VERSION, self.settings))
            return
        header, self.answers, self.damaged = _parse(whole, self.path)
        recorded, wanted = dataclasses.asdict(header.settings), dataclasses.asdict(self.settings)
        differing = [name for name in wanted if name not in _FOR_PEOPLE and recorded[name] != wanted[name]]
        if differing:
            raise JournalError(
                "the output directory holds answers that were given under other settings",
                received=", ".join(f"{name} {wanted[name]}" for name in differing),
                expected=", ".join(f"{name} {recorded[name]}" for name in differing) + f", as in {self.path}",
                hint="give another --output; each bundle, precision and setting has a directory of its own",
            )

    def _append(self, record: object) -> None:
        line = msgspec.json.encode(record) + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        with storage_errors(self.path):
            try:
                written = os.write(self._descriptor, line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._descriptor)
            except OSError:
                # Half a line would swallow the next one.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, end)
                raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(
                "another evaluation is writing to this directory",
                received=self.path.parent,
                expected="one at a time",
                hint="wait until it has ended, or give another --output",
            ) from None
        except OSError:
            pass  # a file system without locks

    def _close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class _Version:
    schema_version: int


def read_answers(directory: Path) -> tuple[RunSettings, dict[tuple[str, int], AnswerLine]]:
    """Return what a directory's answers depend on, and the answers by question hash and budget; nothing is written.

    Raises:
        JournalError: if its first line is damaged, or of a newer version.
    """
    path = directory / JOURNAL
    content = path.read_bytes()
    header, answers, _ = _parse(content[: content.rfind(b"\n") + 1], path)
    return header.settings, answers


def _parse(lines: bytes, path: Path) -> tuple[_Header, dict[tuple[str, int], AnswerLine], int]:
    """Return header, answers, and how many lines are damaged."""
    first, *others = lines.splitlines() or [b""]
    answers, damaged = {}, 0
    for line in others:
        try:
            answer = msgspec.json.decode(line, type=AnswerLine)
        except (msgspec.DecodeError, UnicodeDecodeError):
            damaged += 1
            continue
        answers[answer.question, answer.budget] = answer
    return _parse_header(first, path), answers, damaged


def _parse_header(line: bytes, path: Path) -> _Header:
    try:
        version = msgspec.json.decode(line, type=_Version).schema_version
        header = msgspec.json.decode(line, type=_Header) if version <= SCHEMA_VERSION else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JournalError(
            "the first line of the recorded answers is damaged, so nobody knows which bundle gave them",
            received=f"{path}: {error}",
            hint="give another --output, or move this file away to answer everything again",
        ) from None
    if header is None:
        raise JournalError(
            "the answers were recorded by a newer flashvlm-export",
            received=f"{path}: schema version {version}",
            expected=f"at most {SCHEMA_VERSION}",
            hint="upgrade this package, or give another --output",
        )
    return header
