"""What a data set may hold, and that one message names everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluating import line

from flashvlm_export.errors import ConfigError, DatasetError, UsageError
from flashvlm_export.evaluation.dataset import read_dataset


def test_a_good_one(write_data: Callable[..., Path], questions: list[dict[str, Any]], tmp_path: Path) -> None:
    data = read_dataset(
        write_data(*questions, "", line(id=9, question="Ä?", choices=[], image="images/../images/1.png"))
    )
    assert len(data.questions) == 9
    first, last = data.questions[0], data.questions[-1]
    assert (first.id, first.answers, first.kind, first.metric.name) == ("0", ("cat",), "animals", "exact")
    assert first.image == tmp_path / "images/0.png"
    assert (last.id, last.question) == ("9", "Ä?")
    assert data.questions[6].group == "3"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image": "images/none.png"}, "image 'images/none.png': missing"),
        ({"image": "images"}, "image 'images': no file"),
        ({"image": ""}, "no file"),
        ({"id": "0"}, "id '0' is taken by line 1"),
        ({"id": 0}, "id '0' is taken by line 1"),
        ({"id": " "}, "the id is empty"),
        ({"question": " \n"}, "the question is empty"),
        ({"kind": ""}, "unknown kind ''"),
        ({"kind": "a\nb"}, "unknown kind"),
        ({"kind": "x" * 61}, "unknown kind"),
        (
            {"metric": "exakt"},
            "unknown metric 'exakt': one of exact, vqa, pope, choice, anls, yes_no is expected, did you mean 'exact'?",
        ),
        ({"metric": "anls"}, "kind 'animals' has metric 'anls' here and 'exact' in line 1"),
        ({"answers": []}, "there are no answers"),
        ({"answers": ["", " "]}, "the answers are blank"),
        ({"answers": ["cat", ""]}, "an answer is blank"),
        ({"kind": "v", "metric": "vqa", "answers": ["a", "b", "c"]}, "vqa needs one answer per annotator, from 4"),
        ({"kind": "p", "metric": "pope", "answers": ["maybe"]}, "the answer has to be yes or no"),
        ({"kind": "p", "metric": "pope", "answers": ["yes", "no"]}, "the answer has to be yes or no, one of them"),
        ({"kind": "c", "metric": "choice", "answers": ["A"]}, "choice needs 2 to 26 choices, not 0"),
        (
            {"kind": "c", "metric": "choice", "answers": ["D"], "choices": ["x", "y"]},
            "a letter from A to B or the text",
        ),
        ({"kind": "c", "metric": "choice", "answers": ["A"], "choices": ["x", " "]}, "a choice is blank"),
        ({"group": " "}, "the group is blank"),
        ({"answers": "cat"}, "Expected `array`, got `str` - at `$.answers`"),
        ({"anwers": ["cat"]}, "Object contains unknown field `anwers`"),
        ({"question": None}, "Expected `str`, got `null` - at `$.question`"),
        ('{"id": "x", "image": ', "broken, no JSON object"),
        ("[]", "Expected `object`, got `array`"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_lines(bad: dict[str, Any] | str, message: str, write_data: Callable[..., Path]) -> None:
    path = write_data(line(id="0"), line() | bad if isinstance(bad, dict) else bad)
    with pytest.raises(DatasetError) as caught:
        read_dataset(path)
    assert f"line 2: {message}" in str(caught.value) or (
        "line 2: " in str(caught.value) and message in str(caught.value)
    )
    assert str(path) in str(caught.value.received)
    assert "docs/evaluation.md" in str(caught.value)


def test_one_message_names_every_line(write_data: Callable[..., Path]) -> None:
    path = write_data(line(id="0"), "broken", line(id="0", image="gone.png"), line(id="3", metric="?"))
    with pytest.raises(DatasetError, match="4 problem\\(s\\) in 4 lines") as caught:
        read_dataset(path)
    text = str(caught.value)
    for part in (
        "line 2: broken",
        "line 3: id '0' is taken by line 1",
        "line 3: image 'gone.png': missing",
        "line 4: unknown metric",
    ):
        assert part in text


def test_of_many_problems_the_first_are_shown(write_data: Callable[..., Path]) -> None:
    path = write_data(*(line(id=str(number), image=f"{number}.png") for number in range(50)))
    with pytest.raises(DatasetError) as caught:
        read_dataset(path)
    text = str(caught.value)
    assert "50 problem(s)" in text
    assert "line 20:" in text
    assert "line 21:" not in text
    assert "and 30 more" in text


def test_bytes_that_are_no_text(write_data: Callable[..., Path]) -> None:
    path = write_data(line())
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(DatasetError, match="line 2"):
        read_dataset(path)


def test_a_byte_order_mark_is_passed_over(write_data: Callable[..., Path]) -> None:
    path = write_data(line())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_dataset(path).questions) == 1


def test_nothing_to_read(write_data: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="the data set is empty"):
        read_dataset(write_data("", " "))
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_dataset(path)


def test_samples_are_nested_and_keep_the_order(write_data: Callable[..., Path]) -> None:
    data = read_dataset(write_data(*(line(id=number) for number in range(40))))
    small, large = ([int(question.id) for question in data.sample(limit, 5).questions] for limit in (10, 25))
    assert len(small) == 10
    assert set(small) < set(large)
    assert large == sorted(large)
    assert small != [int(question.id) for question in data.sample(10, 6).questions]
    assert len(data.sample(1000, 0).questions) == 40
    with pytest.raises(ConfigError, match="--limit is out of range"):
        data.sample(0, 0)


def test_kinds_can_be_chosen(write_data: Callable[..., Path], questions: list[dict[str, Any]]) -> None:
    data = read_dataset(write_data(*questions))
    assert {question.kind for question in data.of_kinds(["pope", "pair"]).questions} == {"pope", "pair"}
    with pytest.raises(
        ConfigError, match=r"no questions of this kind[\s\S]*'animal'[\s\S]*animals, pope, pair[\s\S]*mean 'animals'"
    ):
        data.of_kinds(["animal"])
