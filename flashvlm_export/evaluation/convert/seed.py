"""SEED-Bench (https://github.com/AILab-CVC/SEED-Bench): ``questions`` with four choices each; images are DATA_ID.

Videos and questions about several images are left out. ``data_type`` is ``image`` in version 1, ``Single Image`` in 2.
"""

from __future__ import annotations

import msgspec

from flashvlm_export.evaluation.convert.common import LETTER_ANSWER, Converted, Source, read_json, with_options
from flashvlm_export.evaluation.dataset import Record


class _Question(msgspec.Struct):
    question_id: str | int
    data_id: str | list[str]
    data_type: str
    question: str
    choice_a: str
    choice_b: str
    choice_c: str
    choice_d: str
    answer: str


class _File(msgspec.Struct):
    questions: list[_Question]


def convert(source: Source) -> Converted:
    """Return one record per question about one image, metric ``choice``."""
    converted = Converted()
    for item in read_json(source.questions, _File).questions:
        if item.data_type.lower() not in ("image", "single image") or not isinstance(item.data_id, str):
            converted.left_out[f"data type {item.data_type}"] += 1
            continue
        options = [item.choice_a, item.choice_b, item.choice_c, item.choice_d]
        converted.add(
            Record(
                item.question_id,
                source.image(item.data_id),
                source.ask(with_options(item.question, options), LETTER_ANSWER),
                [item.answer],
                source.kind or "seed",
                "choice",
                options,
            )
        )
    return converted
