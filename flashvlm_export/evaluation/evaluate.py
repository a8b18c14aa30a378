"""Asks every question at every budget, but for what the journal has an answer to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import Engine
from flashvlm_export.errors import BudgetError, EvaluationError, ImageError, LLMError, PromptError
from flashvlm_export.evaluation.dataset import Question
from flashvlm_export.evaluation.journal import AnswerLine, Journal
from flashvlm_export.files import sha256_of
from flashvlm_export.progress import Progress
from flashvlm_export.specs import Precision, check_budget

_MOST_FAILURES = 20


@dataclass(frozen=True)
class Reply:
    """What a model said to one question; see :class:`AnswerLine`."""

    text: str
    new_tokens: int
    finish_reason: str


Ask = Callable[[Path, str, int], Reply]
"""Image, question and token budget → answer."""


def parse_budgets(text: str | None, visual_tokens: int) -> list[int]:
    """Return token budgets, largest first, each once.

    Args:
        text: numbers from 1 to ``visual_tokens`` and ``full``, which keeps them all, with commas between; ``None`` for
            the budgets that publications on LLaVA report, 576, 192, 128 and 64 of 576, or the same shares.
        visual_tokens: of one image, without pruning.

    Raises:
        BudgetError: if one is no number, or out of range.
    """
    if text is None:
        shares = (visual_tokens, visual_tokens // 3, visual_tokens * 2 // 9, visual_tokens // 9)
        return sorted({max(share, 1) for share in shares}, reverse=True)
    budgets = set()
    for part in text.split(","):
        word = part.strip()
        if word == "full":
            budgets.add(visual_tokens)
            continue
        try:
            budgets.add(check_budget(int(word), visual_tokens))
        except ValueError:
            raise BudgetError(
                "not a list of token budgets",
                received=repr(text),
                expected=f"whole numbers from 1 to {visual_tokens}, or full, with commas between",
                hint="for example --budgets full,128,32",
            ) from None
    return sorted(budgets, reverse=True)


def bundle_sha256(bundle: Bundle, precision: Precision, engine: Engine | None) -> str:
    """Return one hash over everything in ``bundle`` that takes part in an answer.

    Other graphs, engines and calibration tables stay out, so that adding one does not make recorded answers foreign.
    """
    graphs = tuple(entry.file for entry in bundle.manifest.graphs.values())
    parts = [
        f"{name} {entry.sha256}"
        for name, entry in sorted(bundle.manifest.files.items())
        if not name.startswith(graphs) and not name.startswith("calibration/")
    ]
    parts.append(engine.entry.engine_sha256 if engine else bundle.graph_sha256(precision))
    parts.append(msgspec.json.encode(bundle.manifest.prompt).decode())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def question_keys(questions: Sequence[Question], progress: Progress) -> list[str]:
    """Return a hash of what the model is shown of each question: its words and the bytes of its image.

    Ids, reference answers and metrics are not part of it: changing them asks nothing anew.
    """
    images: dict[Path, str] = {}
    keys = []
    for question in progress.track(questions, "questions"):
        if question.image not in images:
            images[question.image] = sha256_of(question.image)
        text = f"{images[question.image]}\n{question.question}"
        keys.append(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32])
    return keys


def answer_missing(
    questions: Sequence[Question],
    keys: Sequence[str],
    budgets: Sequence[int],
    journal: Journal,
    model: AbstractContextManager[Ask],
    progress: Progress,
) -> int:
    """Ask what the journal does not know, budget by budget, and return how many answers were new.

    Args:
        questions: what to ask.
        keys: their hashes.
        budgets: token budgets.
        journal: takes each answer as it comes.
        model: entered only if there is something to ask.
        progress: shows a bar for each budget.

    Raises:
        EvaluationError: naming each question that could not be answered; the others were.
    """
    missing = {budget: list(_missing(questions, keys, budget, journal)) for budget in budgets}
    if not any(missing.values()):
        return 0
    failures: list[str] = []
    new = 0
    with model as ask:
        for budget, pending in missing.items():
            done = len(questions) - len(pending)
            progress.step(
                f"budget {budget}: {len(pending)} question(s)" + (f", {done} answered before" if done else "")
            )
            for key, question in progress.track(pending, "questions"):
                try:
                    reply = ask(question.image, question.question, budget)
                except (ImageError, PromptError, LLMError) as error:
                    detail = f" ({error.received})" if error.received is not None else ""
                    failures.append(f"{question.id} at budget {budget}: {error.what}{detail}")
                    if len(failures) == _MOST_FAILURES:
                        raise _failed(failures, journal, stopped=True) from error
                    continue
                journal.add(AnswerLine(key, budget, question.id, reply.text, reply.new_tokens, reply.finish_reason))
                new += 1
    if failures:
        raise _failed(failures, journal, stopped=False)
    return new


def _missing(
    questions: Sequence[Question], keys: Sequence[str], budget: int, journal: Journal
) -> Iterator[tuple[str, Question]]:
    """Yield each question that has no answer at ``budget``; of several that look the same to the model, the first."""
    seen = set()
    for key, question in zip(keys, questions, strict=True):
        if (key, budget) not in journal.answers and key not in seen:
            seen.add(key)
            yield key, question


def _failed(failures: list[str], journal: Journal, *, stopped: bool) -> EvaluationError:
    return EvaluationError(
        f"{len(failures)} question(s) could not be answered" + (", so the evaluation stopped" if stopped else ""),
        received="\n            ".join(failures),
        expected="an answer to every question",
        hint=f"mend them or take them out of the data set, then run the same command again: {len(journal.answers)} "
        f"answers are kept in {journal.path}",
    )
