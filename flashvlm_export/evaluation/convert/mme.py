"""MME (https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models): a folder per subtask.

Beside each image, or in ``questions_answers_YN`` beside ``images``, lies a text file of its name: two lines, each a
question, a tab, and ``Yes`` or ``No``. Both questions of an image form a group: MME's score of a subtask is 100 times
accuracy plus group accuracy.
"""

from __future__ import annotations

from pathlib import Path

from flashvlm_export.errors import UsageError
from flashvlm_export.evaluation.convert.common import SHORT_ANSWER, Converted, Source, not_published, read_bytes
from flashvlm_export.evaluation.dataset import Record

_SUFFIXES = (".jpg", ".png", ".jpeg")


def convert(source: Source) -> Converted:
    """Return two records per image, metric ``yes_no``, a kind per subtask."""
    root = source.questions
    if not root.is_dir():
        raise UsageError("MME is a directory", received=root, expected="the directory with one folder per subtask")
    converted = Converted()
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        images = folder / "images" if (folder / "images").is_dir() else folder
        apart = folder / "questions_answers_YN"
        for file in sorted((apart if apart.is_dir() else folder).glob("*.txt")):
            if file.name.startswith("."):  # what macOS leaves in archives
                continue
            image = next((found for found in _candidates(images, file.stem) if found.is_file()), images / file.stem)
            for number, (question, answer) in enumerate(_pairs(file), start=1):
                group = f"{folder.name}/{file.stem}"
                converted.add(
                    Record(
                        f"{group}-{number}",
                        source.relative(image),
                        source.ask(question, SHORT_ANSWER),
                        [answer],
                        source.kind or f"mme-{folder.name}",
                        "yes_no",
                        group=group,
                    )
                )
    return converted


def _candidates(folder: Path, stem: str) -> list[Path]:
    return [folder / f"{stem}{suffix}" for suffix in _SUFFIXES]


def _pairs(file: Path) -> list[tuple[str, str]]:
    try:
        lines = [line for line in read_bytes(file).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise not_published(file, str(error)) from error
    parts = [line.split("\t") for line in lines]
    if not parts or any(len(part) != 2 for part in parts):
        raise not_published(file, "not a question, a tab and an answer on each line")
    return [(question.strip(), answer.strip()) for question, answer in parts]
