"""TextVQA (https://textvqa.org/dataset): ``data`` lists questions with ten answers; images are IMAGE_ID.jpg."""

from __future__ import annotations

import msgspec

from flashvlm_export.evaluation.convert.common import SHORT_ANSWER, Converted, Source, no_answers, read_json
from flashvlm_export.evaluation.dataset import Record


class _Question(msgspec.Struct):
    question_id: int
    image_id: str
    question: str
    answers: list[str] | None = None


class _File(msgspec.Struct):
    data: list[_Question]


def convert(source: Source) -> Converted:
    """Return one record per question, metric ``vqa``."""
    converted = Converted()
    for item in read_json(source.questions, _File).data:
        if not item.answers:
            raise no_answers(source.questions)
        image = source.image(f"{item.image_id}.jpg")
        question = source.ask(item.question, SHORT_ANSWER)
        converted.add(Record(item.question_id, image, question, item.answers, source.kind or "textvqa", "vqa"))
    return converted
