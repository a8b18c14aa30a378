"""GQA (https://cs.stanford.edu/people/dorarad/gqa): one object, question id → question; images are IMAGEID.jpg."""

from __future__ import annotations

import msgspec

from flashvlm_export.evaluation.convert.common import SHORT_ANSWER, Converted, Source, no_answers, read_json
from flashvlm_export.evaluation.dataset import Record


class _Question(msgspec.Struct, rename="camel"):
    image_id: str
    question: str
    answer: str | None = None


def convert(source: Source) -> Converted:
    """Return one record per question, metric ``exact``."""
    converted = Converted()
    for name, item in read_json(source.questions, dict[str, _Question]).items():
        if item.answer is None:
            raise no_answers(source.questions)
        image = source.image(f"{item.image_id}.jpg")
        question = source.ask(item.question, SHORT_ANSWER)
        converted.add(Record(name, image, question, [item.answer], source.kind or "gqa", "exact"))
    return converted
