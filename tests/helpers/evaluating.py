"""Records of a data set, and a model that answers by a rule and counts its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashvlm_export.evaluation.evaluate import Ask, Reply


def line(**fields: Any) -> dict[str, Any]:
    """One good record, with ``fields`` changed."""
    return {
        "id": "1",
        "image": "images/0.png",
        "question": "What is it?",
        "answers": ["cat"],
        "kind": "animals",
        "metric": "exact",
    } | fields


class CountingModel:
    """Says what ``rule`` says, raises it if it is an exception, and remembers what it was asked."""

    def __init__(self, rule: Callable[[Path, str, int], str | BaseException]) -> None:
        self.rule = rule
        self.asked: list[tuple[str, str, int]] = []
        self.selectors: list[tuple[str, int]] = []
        self.opened = 0

    @contextmanager
    def __call__(self) -> Iterator[Ask]:
        self.opened += 1
        yield self._ask

    def _ask(self, image: Path, question: str, budget: int, selector: str) -> Reply:
        self.asked.append((image.name, question, budget))
        self.selectors.append((selector, budget))
        said = self.rule(image, question, budget)
        if isinstance(said, BaseException):
            raise said
        return Reply(said, len(said.split()), "stop")
