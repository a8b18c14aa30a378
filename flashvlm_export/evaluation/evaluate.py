"""Asks every question of every selector at every budget, but for what a journal has an answer to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
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


Ask = Callable[[Path, str, int, str], Reply]
"""Image, question, token budget and selector → answer."""


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
        except BudgetError as error:
            raise BudgetError(
                error.what,
                received=error.received,
                expected=error.expected,
                hint="full keeps every token: --budgets full,128,32",
            ) from None
        except ValueError:
            raise BudgetError(
                "not a list of token budgets",
                received=repr(text),
                expected=f"whole numbers from 1 to {visual_tokens}, or full, with commas between",
                hint="for example --budgets full,128,32",
            ) from None
    return sorted(budgets, reverse=True)


def bundle_sha256(
    bundle: Bundle, precision: Precision, engine: Engine | None = None, selector: str | None = None
) -> str:
    """Return one hash over everything in ``bundle`` that takes part in an answer.

    Other graphs, engines and calibration tables stay out, so that adding one does not make recorded answers foreign.

    Args:
        bundle: an opened bundle.
        precision: of the graph.
        engine: that is run instead of the graph.
        selector: that is run as a graph of its own, behind the encoder.
    """
    manifest = bundle.manifest
    graphs = tuple(entry.file for entry in manifest.graphs.values())
    halves = {name for precision in Precision for name in bundle.split_files(precision)}
    parts = [
        f"{name} {entry.sha256}"
        for name, entry in sorted(manifest.files.items())
        if not name.startswith(graphs) and name not in halves and not name.startswith("calibration/")
    ]
    if engine is not None:
        parts.append(engine.entry.engine_sha256)
    elif selector is not None:
        split = bundle.split_graphs(precision)
        weights = [name for name in bundle.graph_files(precision) if name != manifest.graphs[precision.value].file]
        names = [split.encoder.file, split.selectors[selector].file, *weights]
        parts += [f"{name} {manifest.files[name].sha256}" for name in names]
    else:
        parts.append(bundle.graph_sha256(precision))
    parts.append(msgspec.json.encode(manifest.prompt).decode())
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
    journals: Mapping[str, Journal],
    model: AbstractContextManager[Ask],
    progress: Progress,
    *,
    visual_tokens: int,
) -> int:
    """Ask what the journals do not know, question by question, and return how many answers were new.

    Args:
        questions: what to ask.
        keys: their hashes.
        budgets: token budgets.
        journals: by selector; each takes its answers as they come.
        model: entered only if there is something to ask.
        progress: shows a bar over the questions.
        visual_tokens: the budget that keeps every token, whatever the selector: asked of the first one alone.

    Raises:
        EvaluationError: naming each question that could not be answered; the others were.
    """
    missing = _missing(questions, keys, budgets, journals)
    if not missing:
        return 0
    failures: dict[str, str] = {}
    new = 0
    total = sum(len(cells) for _, cells in missing.values())
    progress.step(f"{total} answer(s) to {len(missing)} question(s) are missing")
    with model as ask:
        for key, (question, cells) in progress.track(list(missing.items()), "questions"):
            unpruned = next(
                (j.answers[key, visual_tokens] for j in journals.values() if (key, visual_tokens) in j.answers), None
            )
            for selector, budget in cells:
                if budget == visual_tokens and unpruned is not None:
                    journals[selector].add(unpruned)
                    new += 1
                    continue
                try:
                    reply = ask(question.image, question.question, budget, selector)
                except (ImageError, PromptError, LLMError) as error:
                    detail = f" ({error.received})" if error.received is not None else ""
                    failures.setdefault(question.id, f"{question.id} at budget {budget}: {error.what}{detail}")
                    if len(failures) == _MOST_FAILURES:
                        raise _failed(failures, journals, stopped=True) from error
                    if isinstance(error, LLMError):  # a smaller budget may fit
                        continue
                    break
                answer = AnswerLine(key, budget, question.id, reply.text, reply.new_tokens, reply.finish_reason)
                journals[selector].add(answer)
                unpruned = answer if budget == visual_tokens else unpruned
                new += 1
    if failures:
        raise _failed(failures, journals, stopped=False)
    return new


def _missing(
    questions: Sequence[Question], keys: Sequence[str], budgets: Sequence[int], journals: Mapping[str, Journal]
) -> dict[str, tuple[Question, list[tuple[str, int]]]]:
    """Return each question that lacks an answer, with the selectors and budgets it lacks it at.

    Of several questions that look the same to the model, the first is asked.
    """
    missing = {}
    for key, question in zip(keys, questions, strict=True):
        cells = [
            (name, budget) for name in journals for budget in budgets if (key, budget) not in journals[name].answers
        ]
        if cells and key not in missing:
            missing[key] = question, cells
    return missing


def _failed(failures: Mapping[str, str], journals: Mapping[str, Journal], *, stopped: bool) -> EvaluationError:
    kept = sum(len(journal.answers) for journal in journals.values())
    return EvaluationError(
        f"{len(failures)} question(s) could not be answered" + (", so the evaluation stopped" if stopped else ""),
        received="\n            ".join(failures.values()),
        expected="an answer to every question",
        hint=f"mend them or take them out of the data set, then run the same command again: {kept} answers "
        f"are kept in {', '.join(str(journal.path) for journal in journals.values())}",
    )
