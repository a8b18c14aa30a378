"""Answers that take their steps together: one run of the model computes the next token of all that are under way."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from flashvlm_export.runtime.llm.base import Embed, Generation, LLMEngine
from flashvlm_export.runtime.llm.sampling import Sampler
from flashvlm_export.specs import Array


@dataclass(eq=False)
class Answer:
    """One answer under way.

    Attributes:
        generation: what was asked.
        slot: its part of the engine's KV cache.
        rows, places: what that holds, in pieces: embeddings ``[n, D]``, positions ``[n, …]``; first the prompt.
        past: how many rows these are.
        token: chosen last, and not in the cache yet.
        new_tokens: chosen so far.
        logits: ``[vocab]``, of what comes behind ``token``; ``None`` until they are computed.
    """

    generation: Generation
    slot: int
    rows: list[Array]
    places: list[Array]
    past: int = 0
    token: int = 0
    new_tokens: int = 0
    logits: Array | None = None

    @property
    def place(self) -> int:
        """Position of ``token``."""
        return int(self.places[-1].max()) + 1

    @property
    def waits(self) -> bool:
        """Whether its next token remains to be computed, as far as can be told before its reader asks."""
        ends = self.new_tokens == self.generation.params.max_new_tokens or self.token in self.generation.stop_token_ids
        return self.logits is None and not ends


class BatchingLLM(LLMEngine):
    """An engine whose KV cache has a slot for each answer under way, ``max_answers`` of them.

    A prompt is run in its slot alone. A step runs one token of each answer, which reads the weights once.

    Args:
        embed: embedding rows of generated tokens.
    """

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.embed = embed
        self._answers: dict[int, Answer] = {}

    @abstractmethod
    def _prefill(self, answer: Answer) -> Array:
        """Run a prompt in its slot, but for what ``_shared`` says is there; return its last logits ``[vocab]``."""

    @abstractmethod
    def _decode(self, answers: Sequence[Answer], rows: Array) -> Array:
        """Run the last token of each answer, whose embeddings are ``rows [n, D]``; return logits ``[n, vocab]``."""

    def _ended(self) -> None:
        """Hear that an answer has ended, in whatever way."""

    def _generate(self, generation: Generation) -> Generator[int, None, None]:
        sampler = Sampler(generation.params)
        slot = next(slot for slot in range(self.max_answers) if slot not in self._answers)
        # Rows of its own, to be compared with the next prompt.
        answer = Answer(generation, slot, [np.array(generation.rows, order="C")], [generation.positions])
        try:
            answer.logits = self._prefill(answer)
            answer.past = len(generation.rows)
            self._answers[slot] = answer
            while True:
                if answer.logits is None:
                    self._step(answer)
                assert answer.logits is not None  # the step saw to it
                answer.token, answer.logits = sampler(answer.logits), None
                answer.new_tokens += 1
                yield answer.token
        finally:
            self._answers.pop(slot, None)
            self._ended()
            self._remember(answer.rows, answer.places, answer.past)

    def _step(self, asked: Answer) -> None:
        """Compute the logits of every answer that waits for some, ``asked`` among them."""
        start = time.perf_counter()
        waiting = [answer for answer in self._answers.values() if answer.waits]
        rows = self.embed(np.array([answer.token for answer in waiting], np.int64))
        logits = self._decode(waiting, rows)
        spent_ms = (time.perf_counter() - start) * 1e3
        for number, answer in enumerate(waiting):
            answer.logits = logits[number]
            answer.rows.append(rows[number : number + 1])
            answer.places.append(np.full_like(answer.places[0][:1], answer.place))
            answer.past += 1
            answer.generation.elsewhere_ms += spent_ms if answer is not asked else 0
