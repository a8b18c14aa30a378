"""ScienceQA (https://scienceqa.github.io): ``problems.json`` by id, ``pid_splits.json``, images SPLIT/ID/image.png.

Questions without a picture are left out, as in the accuracy called ScienceQA-IMG.
"""

from __future__ import annotations

import string

import msgspec

from flashvlm_export.errors import ConfigError
from flashvlm_export.evaluation.convert.common import (
    LETTER_ANSWER,
    Converted,
    Source,
    not_published,
    read_json,
    with_options,
)
from flashvlm_export.evaluation.dataset import Record


class _Problem(msgspec.Struct):
    question: str
    choices: list[str]
    answer: int
    split: str
    hint: str = ""
    image: str | None = None


def convert(source: Source) -> Converted:
    """Return one record per question with a picture, metric ``choice``; the context stands above the question."""
    problems = read_json(source.questions, dict[str, _Problem])
    converted = Converted()
    for name in _names(source, problems):
        if name not in problems:
            raise not_published(source.questions, f"it has no problem {name}, which {source.annotations} lists")
        item = problems[name]
        if item.image is None:
            converted.left_out["without an image"] += 1
            continue
        if not 0 <= item.answer < len(item.choices) <= len(string.ascii_uppercase):
            raise not_published(source.questions, f"problem {name} has answer {item.answer} of {len(item.choices)}")
        context = f"{item.hint.strip()}\n" if item.hint.strip() else ""
        converted.add(
            Record(
                name,
                source.image(item.split, name, item.image),
                source.ask(with_options(context + item.question, item.choices), LETTER_ANSWER),
                [string.ascii_uppercase[item.answer]],
                source.kind or "scienceqa",
                "choice",
                item.choices,
            )
        )
    return converted


def _names(source: Source, problems: dict[str, _Problem]) -> list[str]:
    """Return the ids of the split: from the file that lists them, or from the problems themselves."""
    if source.annotations is not None:
        splits = read_json(source.annotations, dict[str, list[str]])
    else:
        splits = {}
        for name, item in problems.items():
            splits.setdefault(item.split, []).append(name)
    if source.split not in splits:
        raise ConfigError(
            "ScienceQA has no such split", received=f"--split {source.split}", expected=f"one of {', '.join(splits)}"
        )
    return splits[source.split]
