"""A small data set of generated pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.evaluating import line
from PIL import Image


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Write four pictures and a data set of the records or raw lines given."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")

    def write(*records: dict[str, Any] | str, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def questions() -> list[dict[str, Any]]:
    """Eight questions of three kinds and metrics."""
    animals = [line(id=str(number), image=f"images/{number}.png") for number in range(3)]
    there = [
        line(
            id=f"p{number}",
            image=f"images/{number % 4}.png",
            question=f"Is there {number}?",
            answers=[answer],
            kind="pope",
            metric="pope",
        )
        for number, answer in enumerate(("yes", "no", "yes"))
    ]
    pair = [
        line(
            id=f"m{number}",
            image="images/3.png",
            question=f"Is it {number}?",
            answers=["Yes"],
            kind="pair",
            metric="yes_no",
            group="3",
        )
        for number in range(2)
    ]
    return animals + there + pair
