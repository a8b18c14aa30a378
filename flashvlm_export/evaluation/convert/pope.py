"""POPE (https://github.com/RUCAIBox/POPE): JSON lines, each ``Is there a ... in the image?`` with ``yes`` or ``no``."""

from __future__ import annotations

import msgspec

from flashvlm_export.evaluation.convert.common import SHORT_ANSWER, Converted, Source, not_published, read_bytes
from flashvlm_export.evaluation.dataset import Record


class _Question(msgspec.Struct):
    question_id: int
    image: str
    text: str
    label: str


def convert(source: Source) -> Converted:
    """Return one record per question, metric ``pope``; ``coco_pope_random.json`` gives the kind ``pope-random``.

    Ids begin with the kind, so that the three files of POPE can be put together.
    """
    _, _, sampling = source.questions.stem.partition("_pope_")
    kind = source.kind or (f"pope-{sampling}" if sampling else "pope")
    converted = Converted()
    for number, line in enumerate(read_bytes(source.questions).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = msgspec.json.decode(line, type=_Question)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise not_published(source.questions, f"line {number}: {error}") from error
        question = source.ask(item.text, SHORT_ANSWER)
        name = f"{kind}-{item.question_id}"
        converted.add(Record(name, source.image(item.image), question, [item.label], kind, "pope"))
    return converted
