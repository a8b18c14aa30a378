"""VQA v2 (https://visualqa.org/download.html): questions in one file, ten answers each in another, images of COCO."""

from __future__ import annotations

import msgspec

from flashvlm_export.errors import UsageError
from flashvlm_export.evaluation.convert.common import SHORT_ANSWER, Converted, Source, not_published, read_json
from flashvlm_export.evaluation.dataset import Record


class _Question(msgspec.Struct):
    question_id: int
    image_id: int
    question: str


class _Questions(msgspec.Struct):
    data_subtype: str
    questions: list[_Question]


class _Answer(msgspec.Struct):
    answer: str


class _Annotation(msgspec.Struct):
    question_id: int
    answers: list[_Answer]


class _Annotations(msgspec.Struct):
    annotations: list[_Annotation]


def convert(source: Source) -> Converted:
    """Return one record per question, metric ``vqa``."""
    if source.annotations is None:
        raise UsageError(
            "VQA v2 keeps its answers in a second file",
            expected="--annotations v2_mscoco_val2014_annotations.json beside --questions",
        )
    published = read_json(source.questions, _Questions)
    annotations = read_json(source.annotations, _Annotations).annotations
    answers = {item.question_id: [answer.answer for answer in item.answers] for item in annotations}
    converted = Converted()
    for item in published.questions:
        if item.question_id not in answers:
            raise not_published(
                source.annotations, f"it has no answers to question {item.question_id} of {source.questions.name}"
            )
        image = source.image(f"COCO_{published.data_subtype}_{item.image_id:012d}.jpg")
        question = source.ask(item.question, SHORT_ANSWER)
        converted.add(
            Record(item.question_id, image, question, answers[item.question_id], source.kind or "vqav2", "vqa")
        )
    return converted
