"""Each published format, in small files of the published structure; then what can be wrong with a copy of it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashvlm_export.cli import main
from flashvlm_export.errors import ConfigError, DatasetError, StorageError, UsageError
from flashvlm_export.evaluation.convert.common import LETTER_ANSWER, SHORT_ANSWER, Source
from flashvlm_export.evaluation.convert.registry import FORMATS, Written, convert
from flashvlm_export.evaluation.dataset import Question, read_dataset

Made = tuple[Written, list[Question]]


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., None]:
    """Write a small picture at each path below ``tmp_path``."""

    def write(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / name, format="PNG")

    return write


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """Convert published content: text, or what becomes JSON."""

    def convert_content(name: str, content: Any, file: str = "published.json", **options: Any) -> Made:
        path = tmp_path / "published" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        source = Source(path, tmp_path / "sets" / f"{name}.jsonl", images=tmp_path / "images", **options)
        written = convert(name, source, overwrite=True)
        return written, read_dataset(source.output).questions

    return convert_content


def ten(*answers: str) -> list[dict[str, Any]]:
    """Answers of ten annotators as VQA v2 and VizWiz list them; the last answer is repeated."""
    texts = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": number} for number, text in enumerate(texts, start=1)
    ]


def test_gqa(make: Callable[..., Made], picture: Callable[..., None], tmp_path: Path) -> None:
    picture("images/n161313.jpg")
    published = {
        "201307251": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
            "entailed": [],
            "equivalent": ["201307251"],
            "question": "Is it overcast?",
            "imageId": "n161313",
            "isBalanced": True,
            "groups": {"global": None, "local": "13-weather"},
            "answer": "no",
            "semanticStr": "select: scene->verify weather: cloudy [0]",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
            "fullAnswer": "No, it is clear.",
        }
    }
    _, (question,) = make("gqa", published)
    assert (question.id, question.question) == ("201307251", f"Is it overcast?\n{SHORT_ANSWER}")
    assert (question.answers, question.kind, question.metric.name) == (("no",), "gqa", "exact")
    assert question.image.resolve() == tmp_path / "images/n161313.jpg"
    # The published test split has questions only.
    with pytest.raises(DatasetError, match=r"without answers[\s\S]*validation"):
        make("gqa", {"1": {"question": "Is it?", "imageId": "n161313", "isBalanced": True}})


def test_textvqa(make: Callable[..., Made], picture: Callable[..., None]) -> None:
    picture("images/003a8ae2ef43b901.jpg")
    item = {
        "question": "what is the brand of this camera?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck", "Printer"],
        "flickr_original_url": "a",
        "flickr_300k_url": "b",
        "image_width": 1024,
        "image_height": 664,
        "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 6],
        "question_tokens": ["what", "is"],
        "question_id": 34602,
        "set_name": "val",
    }
    published = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [item]}
    _, (question,) = make("textvqa", published)
    assert (question.id, question.metric.name, len(question.answers)) == ("34602", "vqa", 10)
    assert question.metric.score("Dakota", question) == 1.0
    del item["answers"]
    with pytest.raises(DatasetError, match="without answers"):
        make("textvqa", published)


def test_vizwiz(make: Callable[..., Made], picture: Callable[..., None]) -> None:
    picture("images/VizWiz_val_00000000.jpg")
    published = [
        {
            "image": "VizWiz_val_00000000.jpg",
            "question": "Ok. There is another picture I hope it is a better one.",
            "answers": ten("unanswerable"),
            "answer_type": "unanswerable",
            "answerable": 0,
        }
    ]
    _, (question,) = make("vizwiz", published)
    assert (question.id, question.metric.name) == ("VizWiz_val_00000000.jpg", "vqa")
    assert "respond with 'Unanswerable'" in question.question
    assert question.metric.score("Unanswerable", question) == 1.0


def vqav2() -> tuple[dict[str, Any], dict[str, Any]]:
    common = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "val2014", "license": {"name": "CC"}}
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 42, "question": "How many dogs?", "question_id": 42001},
    ]
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": "down",
            "answers": ten("down", "down", "at table", "skateboard", "down"),
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
        },
        {
            "question_type": "how many",
            "multiple_choice_answer": "2",
            "answers": ten("", "2"),  # some annotators of the published files left theirs empty
            "image_id": 42,
            "answer_type": "number",
            "question_id": 42001,
        },
    ]
    task = {"task_type": "Open-Ended", "questions": questions}
    return common | task, common | {"annotations": annotations}


def test_vqav2(make: Callable[..., Made], picture: Callable[..., None], tmp_path: Path) -> None:
    picture("images/COCO_val2014_000000262148.jpg", "images/COCO_val2014_000000000042.jpg")
    questions, annotations = vqav2()
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    _, (first, second) = make("vqav2", questions, annotations=tmp_path / "annotations.json")
    assert (first.id, first.image.name) == ("262148000", "COCO_val2014_000000262148.jpg")
    assert first.answers[:4] == ("down", "down", "at table", "skateboard")
    assert second.metric.score("two", second) == 1.0
    with pytest.raises(UsageError, match="--annotations"):
        make("vqav2", questions)
    annotations["annotations"].pop()
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(DatasetError, match="no answers to question 42001"):
        make("vqav2", questions, annotations=tmp_path / "annotations.json")


def test_pope(make: Callable[..., Made], picture: Callable[..., None]) -> None:
    picture("images/COCO_val2014_000000016631.jpg")
    published = (
        '{"question_id": 1, "image": "COCO_val2014_000000016631.jpg", "text": "Is there a person in the image?", '
        '"label": "yes"}\n'
        '{"question_id": 2, "image": "COCO_val2014_000000016631.jpg", "text": "Is there a refrigerator in the image?", '
        '"label": "no"}\n'
    )
    written, (first, second) = make("pope", published, "coco_pope_adversarial.json")
    assert written.kinds == {"pope-adversarial": 2}
    assert (first.id, first.answers, second.answers) == ("pope-adversarial-1", ("yes",), ("no",))
    with pytest.raises(DatasetError, match="line 3"):
        make("pope", published + '{"question_id": 3, "image"')


def test_mme_in_both_of_its_layouts(picture: Callable[..., None], tmp_path: Path) -> None:
    root = tmp_path / "MME_Benchmark"
    picture("MME_Benchmark/count/000000006723.jpg", "MME_Benchmark/artwork/images/10002.png")
    (root / "count/000000006723.txt").write_text(
        "Are there two cats? Please answer yes or no.\tYes\nAre there three cats? Please answer yes or no.\tNo\n"
    )
    (root / "artwork/questions_answers_YN").mkdir()
    (root / "artwork/questions_answers_YN/10002.txt").write_text(
        "Does this artwork exist in the form of painting? Please answer yes or no.\tYes\n"
        "Does this artwork exist in the form of glassware? Please answer yes or no.\tNo\n"
    )
    (root / "count/._000000006723.txt").write_bytes(b"\x00\x05\x16\x07")  # macOS leaves such files in archives
    (root / "readme.txt").write_text("not a subtask")
    source = Source(root, tmp_path / "mme.jsonl")
    assert convert("mme", source).kinds == {"mme-artwork": 2, "mme-count": 2}
    questions = read_dataset(source.output).questions
    assert [question.group for question in questions] == ["artwork/10002"] * 2 + ["count/000000006723"] * 2
    assert questions[0].image.name == "10002.png"
    assert questions[2].question.startswith("Are there two cats? Please answer yes or no.\n")
    (root / "count/000000006723.txt").write_text("no tab here\n")
    with pytest.raises(DatasetError, match="a question, a tab and an answer"):
        convert("mme", source, overwrite=True)
    with pytest.raises(UsageError, match="MME is a directory"):
        convert("mme", Source(root / "readme.txt", tmp_path / "x.jsonl"))


def scienceqa() -> dict[str, Any]:
    problem = {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "To find the answer, look at the compass rose.",
        "split": "test",
    }
    return {
        "1": problem | {"split": "train"},
        "4": problem,
        "5": problem | {"image": None},
        "11": problem | {"answer": 3, "hint": "Use the map below."},
    }


def test_scienceqa(make: Callable[..., Made], picture: Callable[..., None], tmp_path: Path) -> None:
    picture("images/test/4/image.png", "images/test/11/image.png")
    splits = tmp_path / "pid_splits.json"
    splits.write_text(json.dumps({"train": ["1"], "minitest": ["11"], "test": ["4", "5", "11"]}))
    written, (first, last) = make("scienceqa", scienceqa(), annotations=splits)
    assert written.left_out == {"without an image": 1}
    assert (first.id, first.answers, last.answers) == ("4", ("A",), ("D",))
    assert first.question == (
        "Which of these states is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma\n"
        + LETTER_ANSWER
    )
    assert last.question.startswith("Use the map below.\nWhich of these")
    assert last.metric.score("D. Oklahoma", last) == 1.0
    assert [question.id for question in make("scienceqa", scienceqa())[1]] == ["4", "11"]
    assert [q.id for q in make("scienceqa", scienceqa(), annotations=splits, split="minitest")[1]] == ["11"]
    with pytest.raises(ConfigError, match="no such split"):
        make("scienceqa", scienceqa(), split="dev")
    with pytest.raises(DatasetError, match="answer 9 of 4"):
        make("scienceqa", {"4": scienceqa()["4"] | {"answer": 9}})


def test_mmbench(make: Callable[..., Made], tmp_path: Path) -> None:
    def encoded(colour: int) -> str:
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(stream, "JPEG")
        return base64.b64encode(stream.getvalue()).decode()

    columns = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "comment"]
    rows = [
        ["241", "What is shown?", "nan", "a cat", "a dog", "", "", "A", "attribute", encoded(1), "s", "l2", "nan"],
        ["1000241", "What is shown?", "", "a dog", "a cat", "", "", "B", "attribute", "241", "s", "l2", ""],
        ["252", '"Which ""one""\nis it?"', "Look.", "x", "y", "z", "w", "D", "c", encoded(2), "s", "l2", ""],
    ]
    published = "".join("\t".join(row) + "\n" for row in [columns, *rows])
    _, (first, rotated, last) = make("mmbench", published, "mmbench_dev_en.tsv")
    assert first.choices == ("a cat", "a dog")
    assert first.question == f"What is shown?\nA. a cat\nB. a dog\n{LETTER_ANSWER}"
    assert (first.group, rotated.group, last.group) == ("241", "241", "252")
    assert first.image == rotated.image
    assert last.question.startswith('Look.\nWhich "one"\nis it?\nA. x')
    assert Image.open(last.image).getpixel((0, 0))[0] == 2
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["241.jpg", "252.jpg"]
    for cell, content, message in (
        ("answer", "", "without answers"),
        ("image", "%" * 99, "not base64"),
        ("index", "", "no index"),
    ):
        broken = [[content if name == cell else text for name, text in zip(columns, row, strict=True)] for row in rows]
        with pytest.raises(DatasetError, match=message):
            make("mmbench", "".join("\t".join(row) + "\n" for row in [columns, *broken]))


def test_seed(make: Callable[..., Made], picture: Callable[..., None]) -> None:
    picture("images/1454426_2591111986")
    item = {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    video = item | {"data_id": "94328.webm", "data_type": "video", "question_id": "v1738", "question_type_id": 10}
    second = item | {"data_type": "Single Image", "question_id": "5_0", "level": "L1"}
    several = item | {"data_type": "Multiple Images", "question_id": "17_0", "data_id": ["a.png", "b.png"]}
    published = {"questions": [item, video, second, several], "question_type": {"Instances Counting": 5}}
    written, questions = make("seed", published, kind="seed-image", instruction="")
    assert [question.id for question in questions] == ["101669", "5_0"]
    assert written.left_out == {"data type video": 1, "data type Multiple Images": 1}
    assert questions[0].question == "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four"
    assert questions[0].kind == "seed-image"
    with pytest.raises(DatasetError, match="no question of the file can be used"):
        make("seed", {"questions": [video]})


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"mme", "pope", "mmbench"}))
@pytest.mark.parametrize("content", ["{", "[1]", '{"data": 1, "questions": 2}', ""])
def test_a_file_of_another_format_is_refused(
    name: str, content: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text('{"annotations": []}')
    with pytest.raises(DatasetError, match="not of the published format"):
        make(name, content, annotations=tmp_path / "a.json" if name == "vqav2" else None)


def test_missing_images_are_all_named_and_nothing_is_written(make: Callable[..., Made], tmp_path: Path) -> None:
    questions, annotations = vqav2()
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(DatasetError, match="2 problem") as caught:
        make("vqav2", questions, annotations=tmp_path / "annotations.json")
    assert "COCO_val2014_000000262148.jpg" in str(caught.value)
    assert "COCO_val2014_000000000042.jpg" in str(caught.value)
    assert not list((tmp_path / "sets").iterdir())


def test_the_command(picture: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture("images/1.jpg")
    published = tmp_path / "questions.json"
    published.write_text(json.dumps({"7": {"imageId": "1", "question": "Is it?", "answer": "yes"}}))
    output = tmp_path / "new" / "gqa.jsonl"
    command = ["dataset", "gqa", "--questions", str(published), "--images", str(tmp_path / "images")]
    assert main([*command, "--output", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "data": str(output),
        "format": "gqa",
        "questions": 1,
        "kinds": {"gqa": 1},
        "left_out": {},
    }
    # Paths are relative to the data set, so that a folder with both can be moved.
    assert json.loads(output.read_text())["image"] == "../images/1.jpg"
    for arguments, code, message in (
        ([*command, "--output", str(output)], 1, "there already"),
        (["dataset", "gqua", *command[2:], "--output", str(tmp_path / "x")], 2, "unknown format"),
        ([*command[:4], "--output", str(tmp_path / "x")], 2, "needs a folder for images"),
        (
            [*command[:2], "--questions", str(tmp_path / "none.json"), "--output", str(tmp_path / "x")],
            2,
            "cannot be read",
        ),
    ):
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert main([*command, "--output", str(output), "--overwrite"]) == 0
    assert "flashvlm eval BUNDLE --data" in capsys.readouterr().out
    with pytest.raises(StorageError):
        convert("gqa", Source(published, published / "x.jsonl", images=tmp_path / "images"))
