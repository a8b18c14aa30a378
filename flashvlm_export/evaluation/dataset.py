"""The data set: one question per line, as JSON.

::

    {"id": "1", "image": "cat.jpg", "question": "What is it?", "answers": ["cat"], "kind": "animals", "metric": "exact"}

Everything is checked before anything is asked, and one error names every line that cannot be used.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from flashvlm_export.errors import ConfigError, DatasetError, UsageError
from flashvlm_export.evaluation.metrics import METRICS, Metric
from flashvlm_export.files import sha256_of

_MOST_SHOWN = 20
_LONGEST_KIND = 60


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line as it stands in the file.

    Attributes:
        id: unique in the file.
        image: path, relative to the file's folder.
        question: what the model is asked, word for word, options and instructions included.
        answers: right ones; with metric ``vqa`` one per annotator.
        kind: what is reported together; all questions of a kind have the same metric.
        metric: name in ``METRICS``.
        choices: texts of the options A, B, ... where the metric is ``choice``.
        group: questions of one group (such as those about one image) are resampled together, and are also reported as
            right only where all of them are.
    """

    id: str | int
    image: str
    question: str
    answers: list[str]
    kind: str
    metric: str
    choices: list[str] = msgspec.field(default_factory=list)
    group: str | None = None


@dataclass(frozen=True)
class Question:
    """A checked line; see :class:`Record`. ``image`` is where the file is from here."""

    id: str
    image: Path
    question: str
    answers: tuple[str, ...]
    kind: str
    metric: Metric
    choices: tuple[str, ...]
    group: str | None


@dataclass(frozen=True)
class DataSet:
    """A checked data set, or some questions of it."""

    path: Path
    sha256: str
    questions: list[Question]

    def of_kinds(self, kinds: Sequence[str]) -> DataSet:
        """Return the questions of ``kinds``.

        Raises:
            ConfigError: if there is no such kind.
        """
        known = list(dict.fromkeys(question.kind for question in self.questions))
        unknown = [kind for kind in kinds if kind not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, 1)
            raise ConfigError(
                "the data set has no questions of this kind",
                received=", ".join(map(repr, unknown)),
                expected=f"among {', '.join(known)}",
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
        return DataSet(self.path, self.sha256, [question for question in self.questions if question.kind in kinds])

    def sample(self, limit: int, seed: int) -> DataSet:
        """Return ``limit`` questions drawn at random, in the file's order; a larger limit holds those of a smaller one.

        Raises:
            ConfigError: if ``limit`` is less than 1.
        """
        if limit < 1:
            raise ConfigError("--limit is out of range", received=limit, expected="1 question or more")
        drawn = np.random.default_rng(seed).permutation(len(self.questions))[:limit]
        return DataSet(self.path, self.sha256, [self.questions[index] for index in sorted(drawn)])


def read_dataset(path: Path) -> DataSet:
    """Return the data set in a JSON-lines file; empty lines are passed over.

    Raises:
        UsageError: if the file cannot be read.
        DatasetError: naming every line that is broken, of an unknown metric, without answers, with an id that was there
            before, or with an image that is missing.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(
            "the data set cannot be read",
            received=f"{path}: {error.strerror or error}",
            expected="a file of JSON lines",
            hint="flashvlm dataset FORMAT makes one from the published files of a benchmark",
        ) from error
    problems: list[str] = []
    records: list[tuple[str, Record]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append((f"line {number}", msgspec.json.decode(line, type=Record)))
        except msgspec.ValidationError as error:
            problems.append(f"line {number}: {error}")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            problems.append(f"line {number}: broken, no JSON object: {error}")
    questions, found = check_records(records, path.parent)
    problems += found
    if problems:
        count = len([line for line in lines if line.strip()])
        raise unusable(
            path,
            problems,
            f"{count} lines",
            expected="one JSON object per line with id, image, question, answers, kind and metric",
            hint="mend or remove these lines and run this again; docs/evaluation.md describes the format",
        )
    if not questions:
        raise DatasetError("the data set is empty", received=path, expected="one JSON object per line, a question each")
    return DataSet(path, sha256_of(path), questions)


def check_records(records: Iterable[tuple[str, Record]], folder: Path) -> tuple[list[Question], list[str]]:
    """Return the questions, and what is wrong with them.

    Args:
        records: each with the words that name its place in messages.
        folder: what image paths are relative to.
    """
    questions: list[Question] = []
    problems: list[str] = []
    places: dict[str, str] = {}
    metrics: dict[str, tuple[str, str]] = {}
    images: dict[str, str | None] = {}
    for place, record in records:
        name = str(record.id)
        faults = _faults(record)
        if name in places:
            faults.append(f"id {name!r} is taken by {places[name]}")
        kind_metric, first = metrics.setdefault(record.kind, (record.metric, place))
        if record.metric in METRICS and kind_metric in METRICS and record.metric != kind_metric:
            faults.append(f"kind {record.kind!r} has metric {record.metric!r} here and {kind_metric!r} in {first}")
        if record.image not in images:
            images[record.image] = _image_problem(folder, record.image)
        if images[record.image]:
            faults.append(f"image {record.image!r}: {images[record.image]}")
        places.setdefault(name, place)
        problems += [f"{place}: {fault}" for fault in faults]
        if not faults:
            questions.append(
                Question(
                    name,
                    folder / record.image,
                    record.question,
                    tuple(record.answers),
                    record.kind,
                    METRICS[record.metric],
                    tuple(record.choices),
                    record.group,
                )
            )
    return questions, problems


def unusable(path: Path, problems: list[str], found_in: str, *, expected: str, hint: str) -> DatasetError:
    """Return the error that lists ``problems`` of the file at ``path``, found in so many lines or questions."""
    shown = problems[:_MOST_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return DatasetError(
        f"the data set cannot be used: {len(problems)} problem(s) in {found_in}",
        received="\n            ".join([str(path), *shown]),
        expected=expected,
        hint=hint,
    )


def _faults(record: Record) -> list[str]:
    faults = []
    if not str(record.id).strip():
        faults.append("the id is empty")
    if not record.question.strip():
        faults.append("the question is empty")
    if not record.kind.strip() or len(record.kind) > _LONGEST_KIND or not record.kind.isprintable():
        faults.append(
            f"unknown kind {record.kind[:80]!r}: a name of 1 to {_LONGEST_KIND} printable characters is expected"
        )
    if record.group is not None and not record.group.strip():
        faults.append("the group is blank: leave it out, or name one")
    if not any(answer.strip() for answer in record.answers):
        faults.append("there are no answers" if not record.answers else "the answers are blank")
    elif record.metric in METRICS:
        problem = METRICS[record.metric].problem(record)
        faults += [problem] if problem else []
    if record.metric not in METRICS:
        near = difflib.get_close_matches(record.metric, METRICS, 1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        faults.append(f"unknown metric {record.metric!r}: one of {', '.join(METRICS)} is expected{meant}")
    return faults


def _image_problem(folder: Path, name: str) -> str | None:
    try:
        if not name or (folder / name).is_dir():
            return "no file"
        return None if (folder / name).is_file() else "missing"
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        return str(error)
