"""The formats by name, each module imported when it is asked for; what it returns is checked and written here."""

from __future__ import annotations

import collections
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from flashvlm_export.errors import ConfigError, DatasetError, StorageError
from flashvlm_export.files import storage_errors

if TYPE_CHECKING:
    from flashvlm_export.evaluation.convert.common import Converted, Source


@dataclass(frozen=True)
class Format:
    """A published format: its module here, and what to give for it."""

    module: str
    summary: str


@dataclass(frozen=True)
class Written:
    """What became of a published file: questions, of which kinds, and what was left out for which reason."""

    questions: int
    kinds: dict[str, int]
    left_out: dict[str, int]


#: By name.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "gqa": Format("gqa", "testdev_balanced_questions.json"),
        "textvqa": Format("textvqa", "TextVQA_0.5.1_val.json"),
        "pope": Format("pope", "coco_pope_random.json"),
        "scienceqa": Format("scienceqa", "problems.json, with pid_splits.json as annotations"),
        "mme": Format("mme", "the directory with one folder per subtask, images inside"),
        "mmbench": Format("mmbench", "mmbench_dev_en.tsv, images inside"),
        "vqav2": Format("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json, with its annotations"),
        "vizwiz": Format("vizwiz", "val.json"),
        "seed": Format("seed", "SEED-Bench.json"),
    }
)


def convert(name: str, source: Source, *, overwrite: bool = False) -> Written:
    """Write the data set that ``source`` asks for.

    Raises:
        ConfigError: if there is no such format.
        UsageError: if a file that the format needs is not given, or cannot be read.
        DatasetError: if a file is not of the format, has no answers, or images are missing; nothing is written.
        StorageError: if the output is there already, or cannot be written.
    """
    from flashvlm_export.evaluation.convert.common import write_records
    from flashvlm_export.evaluation.dataset import check_records, unusable

    if name not in FORMATS:
        raise ConfigError("unknown format", received=repr(name), expected=f"one of {', '.join(FORMATS)}")
    if source.output.exists() and not overwrite:
        raise StorageError(
            "the data set is there already",
            received=source.output,
            hint="choose another --output, or replace it with --overwrite",
        )
    module = importlib.import_module(f"flashvlm_export.evaluation.convert.{FORMATS[name].module}")
    converted: Converted = module.convert(source)
    if not converted.records:
        raise DatasetError(
            "no question of the file can be used",
            received=", ".join(f"{count}: {reason}" for reason, count in converted.left_out.items()) or "no questions",
            expected=f"{FORMATS[name].summary}, as published",
        )
    # Image paths lead through the data set's folder, so it has to be there for them to be looked up.
    with storage_errors(source.output):
        source.output.parent.mkdir(parents=True, exist_ok=True)
    questions, problems = check_records(converted.records, source.output.parent)
    if problems:
        raise unusable(
            source.questions,
            problems,
            f"{len(converted.records)} questions",
            expected="every question with its answer, and every image below --images",
            hint="check --images and that your copy is complete; nothing was written",
        )
    write_records(source.output, [record for _, record in converted.records])
    kinds = collections.Counter(question.kind for question in questions)
    return Written(len(questions), dict(kinds), dict(converted.left_out))
