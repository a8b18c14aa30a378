"""VizWiz-VQA (https://vizwiz.org/tasks-and-datasets/vqa): a list of questions with ten answers, one per image."""

from __future__ import annotations

import msgspec

from flashvlm_export.evaluation.convert.common import SHORT_ANSWER, Converted, Source, no_answers, read_json
from flashvlm_export.evaluation.dataset import Record

# As LLaVA-1.5 was evaluated: it would answer what cannot be answered.
_MAY_BE_UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT_ANSWER}"


class _Answer(msgspec.Struct):
    answer: str


class _Question(msgspec.Struct):
    image: str
    question: str
    answers: list[_Answer] | None = None


def convert(source: Source) -> Converted:
    """Return one record per question, metric ``vqa``; the image's name is its id."""
    converted = Converted()
    for item in read_json(source.questions, list[_Question]):
        if not item.answers:
            raise no_answers(source.questions)
        question = source.ask(item.question, _MAY_BE_UNANSWERABLE)
        answers = [answer.answer for answer in item.answers]
        converted.add(Record(item.image, source.image(item.image), question, answers, source.kind or "vizwiz", "vqa"))
    return converted
