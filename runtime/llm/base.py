"""A language-model engine: prompt embeddings in, token ids out as they come.

The base class owns the life cycle, the checks, the stop conditions and the clock; an engine writes three small methods.
"""

from __future__ import annotations

import math
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Literal, TypeVar

import numpy as np

from flashvlm_export.errors import ConfigError, LLMError, PromptTooLongError, UsageError
from flashvlm_export.specs import Array

Embed = Callable[[Array], Array]
"""Token ids, int64 ``[n]`` → their rows of the embedding table, floating point ``[n, D]``."""

E = TypeVar("E", bound="LLMEngine")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when the answer ends, beside at a stop token.

    Attributes:
        max_new_tokens: the answer ends after this many tokens.
        temperature: logits are divided by it; 0 always takes the likeliest token (greedy).
        top_k: choose among this many likeliest tokens; 0 for all.
        top_p: choose among the likeliest tokens that together reach this probability; 1 for all.
        seed: of the random choice; the same seed and prompt give the same answer. ``None`` differs every time.
        stop: the answer ends before the first of these texts, whichever engine gives it. What an engine yields is
            tokens, so that the pipeline looks for them.

    Raises:
        ConfigError: if a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(_is_int(self.max_new_tokens, 1), "max_new_tokens", self.max_new_tokens, "a whole number from 1")
        _require(
            _is_real(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "a number from 0; 0 is greedy",
        )
        _require(_is_int(self.top_k, 0), "top_k", self.top_k, "a whole number from 0; 0 is off")
        _require(_is_real(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and up to 1; 1 is off")
        _require(self.seed is None or _is_int(self.seed, 0), "seed", self.seed, "a whole number from 0, or None")
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        _require(texts, "stop", self.stop, "a tuple of texts, none of them empty")


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do.

    Attributes:
        embeddings: takes prompt embeddings; without, it takes text only.
        explicit_positions: takes a position per prompt token; without, they count up from 0.
        batch: works on several answers at once; see :attr:`LLMEngine.max_answers`.
        streaming: hands out each token when it is known; without, all of them at the end.
        sampling: obeys temperature, top-k and top-p; without, it is greedy.
        prefix_reuse: need not compute the beginning that a prompt shares with the one before it.
    """

    embeddings: bool
    explicit_positions: bool
    batch: bool
    streaming: bool
    sampling: bool
    prefix_reuse: bool


@dataclass(frozen=True)
class Limits:
    """What an opened engine takes.

    Attributes:
        width: channels of an embedding.
        max_positions: of prompt and answer together.
        vocab_size: token ids it may hand out.
        eos_token_ids: ids that end an answer by its own account; empty if it does not say.
        position_axes: numbers of a position: 1, or 3 for time, row and column (M-RoPE).
    """

    width: int
    max_positions: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    position_axes: int = 1


@dataclass(frozen=True)
class GenerationStats:
    """One finished generation.

    Attributes:
        prompt_tokens: rows of the prompt.
        reused_tokens: of them, those that were known from the prompt before and not computed.
        new_tokens: tokens handed out; a stop token is none of them.
        prefill_ms: until the first token was known (the time to first token, from embeddings on).
        decode_ms: all later steps together, without the time the reader took between them; includes the step that
            found a stop token. A server goes on while another of several answers is read: then this is only what was
            waited for it.
        finish_reason: ``stop`` at a stop token or text, ``length`` at ``max_new_tokens``, ``closed`` if the reader went
            away.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_ms: float
    decode_ms: float
    finish_reason: Literal["stop", "length", "closed"]


@dataclass(eq=False)
class Generation:
    """One answer under way: what was asked, and what an engine tells of it beside the tokens.

    Attributes:
        rows: floating point ``[S, D]``: the prompt; not to be changed.
        positions: int64 ``[S]``.
        params: how to choose tokens.
        stop_token_ids: ids that end the answer.
        reused_tokens: rows that were known already and not computed.
        elsewhere_ms: time spent on tokens of this answer while that of another one was asked for.
    """

    rows: Array
    positions: Array
    params: SamplingParams
    stop_token_ids: Collection[int]
    reused_tokens: int = 0
    elsewhere_ms: float = 0.0


class LLMEngine(ABC):
    """Generates answers. Constructing is free; ``open()`` or ``with`` loads the model. Not thread-safe.

    Attributes:
        last_run: of the generation that ended last; ``None`` before, after one was begun, and after one that failed.
        max_answers: answers that may be under way at once; above 1 only with the capability ``batch``. An engine that
            has the weights in its own memory then computes the next token of all of them in one go, when that of any
            is asked for: read their streams in turns.
        reuse_prefix: keep what was computed of a prompt, with the memory it takes, for one that begins alike; only
            with the capability, and with one answer at a time. Off at first, so that times of prefill are those of
            whole prompts.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(self) -> None:
        self.last_run: GenerationStats | None = None
        self.max_answers = 1
        self.reuse_prefix = False
        self._known = (np.empty((0, 0)), np.empty(0))
        self._limits: Limits | None = None
        self._running = 0
        # Weak, so that a stream its reader has dropped ends at once instead of keeping the engine busy.
        self._streams: weakref.WeakSet[Generator[int, None, None]] = weakref.WeakSet()

    @property
    def limits(self) -> Limits:
        """What this engine takes; raises :class:`LLMError` while it is closed."""
        if self._limits is None:
            raise LLMError(
                "the language model is not open", hint="use it in a with statement, or call open(), a pipeline's load()"
            )
        return self._limits

    def open(self) -> None:
        """Load the model; raises :class:`SessionError` or :class:`DependencyError` where that is not possible."""
        if self._limits is None:
            self._limits = self._open()

    def close(self) -> None:
        """End streams that are still being read and release the model; may be called twice."""
        if self._limits is not None:
            for stream in list(self._streams):
                stream.close()
            self._limits = None
            self._known = (np.empty((0, 0)), np.empty(0))
            self._close()

    def require_gaps(self) -> None:
        """Raise :class:`UsageError` unless this kind of engine takes positions with gaps; it need not be open."""
        if not self.capabilities.explicit_positions:
            raise UsageError(
                f"the engine '{self.name}' counts positions by itself",
                received="kept tokens with their original positions",
                expected="contiguous ones",
                hint="another engine, or --positions contiguous, with which a prompt in a file has to be written anew",
            )

    def embedding_rows(self, token_ids: Array) -> Array | None:
        """Return the model's own embeddings of ``token_ids``, floating point ``[n, D]``; ``None`` if it shows none."""
        return None

    def generate(
        self,
        inputs_embeds: Array,
        params: SamplingParams,
        *,
        stop_token_ids: Collection[int],
        positions: Array | None = None,
    ) -> Generator[int, None, None]:
        """Check everything now, and return the stream of token ids; the work starts when the first is asked for.

        Close the stream to stop early; ``last_run`` has the numbers once it has ended.

        Args:
            inputs_embeds: floating point ``[S, D]``: the prompt, text and visual tokens; not changed.
            params: how to choose tokens.
            stop_token_ids: ids that end the answer; they are not handed out.
            positions: int64 ``[S]``, ascending, or ``[S, 3]`` with three axes: where each row stands; the answer goes
                on behind the largest. ``None`` counts up from 0.

        Raises:
            LLMError: here, if the engine is closed, or the prompt is empty, too wide or narrow, too long or not finite;
                from the stream, if as many as can be are being read, or the model fails.
            UsageError: if the engine cannot take these positions.
        """
        self._check_prompt(inputs_embeds)
        counted = counted_positions(len(inputs_embeds), self.limits.position_axes)
        positions = counted if positions is None else positions
        self._check_positions(positions, counted, params)
        stream = self._stream(Generation(inputs_embeds, positions, params, frozenset(stop_token_ids)))
        self._streams.add(stream)
        return stream

    @property
    def identity(self) -> str:
        """Which model answers, for records: the engine's name, and what tells its files from others."""
        return self.name

    @abstractmethod
    def _open(self) -> Limits: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _generate(self, generation: Generation) -> Generator[int, None, None]:
        """Yield token ids; the base class stops at a stop token or ``max_new_tokens`` and closes the generator.

        An engine that stops by itself may end early; it may yield the stop token or not. One that reuses a prefix
        asks ``_shared`` how much, and tells ``_remember`` in the end.
        """

    def _shared(self, generation: Generation) -> int:
        """Return how many rows of the prompt need not be computed, for an engine that reuses them.

        Never all: the last one is computed in any case, for its logits.
        """
        if self._keeps_prefix:
            rows, positions = self._known
            shared = min(common_prefix(rows, generation.rows), common_prefix(positions, generation.positions))
            generation.reused_tokens = min(shared, len(generation.rows) - 1)
        return generation.reused_tokens

    def _remember(self, rows: Sequence[Array], positions: Sequence[Array], count: int) -> None:
        """Note what the engine holds for the next prompt: the first ``count`` rows of this one and its answer."""
        count = count if self._keeps_prefix else 0
        self._known = (np.concatenate(rows)[:count], np.concatenate(positions)[:count])

    @property
    def _keeps_prefix(self) -> bool:
        return self.reuse_prefix and self.max_answers == 1

    def _stream(self, generation: Generation) -> Generator[int, None, None]:
        full = self._running >= self.max_answers
        if self._limits is None or full:
            raise LLMError(
                "the language model cannot begin this answer",
                received=f"{self._running} still being read" if full else "a closed engine",
                expected=f"at most {self.max_answers} at once" if full else None,
                hint="read an answer to its end, or close its stream, first" if full else "call open() first",
            )
        self._running, self.last_run = self._running + 1, None
        params, new_tokens, step_ms = generation.params, 0, [0.0, 0.0]
        reason: Literal["stop", "length", "closed"] | None = None
        tokens = self._generate(generation)
        try:
            while reason is None:
                start = time.perf_counter()
                token = next(tokens, None)
                step_ms[min(new_tokens, 1)] += (time.perf_counter() - start) * 1e3
                if token is None or token in generation.stop_token_ids:
                    reason = "stop"
                else:
                    new_tokens += 1
                    yield token
                    if new_tokens == params.max_new_tokens:
                        reason = "length"
        except GeneratorExit:
            reason = "length" if new_tokens == params.max_new_tokens else "closed"
            raise
        finally:
            self._running -= 1
            self.last_run = reason and GenerationStats(
                len(generation.rows),
                generation.reused_tokens,
                new_tokens,
                step_ms[0],
                step_ms[1] + generation.elsewhere_ms,
                reason,
            )
            tokens.close()

    def _check_prompt(self, inputs_embeds: Array) -> None:
        limits = self.limits
        shape = inputs_embeds.shape
        if inputs_embeds.ndim != 2 or shape[0] == 0 or shape[1] != limits.width or inputs_embeds.dtype.kind != "f":
            raise LLMError(
                "the language model cannot take these prompt embeddings",
                received=f"{inputs_embeds.dtype}{list(shape)}",
                expected=f"floating point [tokens, {limits.width}] with at least one token",
                hint="visual graph, embedding table and decoder have to come from one bundle",
            )
        if not np.isfinite(inputs_embeds).all():
            bad = int(np.argmin(np.isfinite(inputs_embeds).all(axis=1)))
            raise LLMError(
                "the prompt embeddings contain NaN or infinity",
                received=f"the first in row {bad} of {shape[0]}",
                hint="run the visual graph in fp32 to see whether half precision overflowed there",
            )

    def _check_positions(self, positions: Array, counted: Array, params: SamplingParams) -> None:
        """Check that ``positions`` fit the prompt, whose rows ``counted`` numbers, and leave room for the answer."""
        if positions.shape != counted.shape or positions.dtype != np.int64 or not _ascending_from_0(positions):
            raise LLMError(
                "these are not the positions of the prompt",
                received=f"{positions.dtype}{list(positions.shape)}",
                expected=f"int64{list(counted.shape)}, {'ascending, ' if counted.ndim == 1 else ''}0 or more",
            )
        if not np.array_equal(positions, counted):
            self.require_gaps()
        end, most = int(positions.max()) + 1, self.limits.max_positions
        if end + params.max_new_tokens > most:
            room = most - params.max_new_tokens
            shorter = "shorten the question" if end > len(counted) else "keep fewer visual tokens (a smaller budget)"
            raise PromptTooLongError(
                "prompt and answer together are too long for the language model",
                received=f"{end} prompt positions + up to {params.max_new_tokens} new tokens",
                expected=f"at most {most} together",
                hint=f"{shorter} so that the prompt takes {room} positions, or ask for at most {most - end} new tokens"
                if room > 0 and end < most
                else f"{shorter}, or ask for fewer new tokens",
            )

    def __enter__(self: E) -> E:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def counted_positions(count: int, axes: int) -> Array:
    """Return int64 ``[count]`` from 0, or ``[count, axes]`` with all axes alike."""
    counted = np.arange(count, dtype=np.int64)
    return counted if axes == 1 else np.repeat(counted[:, None], axes, axis=1)


def _ascending_from_0(positions: Array) -> bool:
    """Whether positions of one axis ascend; those of more may turn back at the end of each line of an image."""
    return bool(positions.min() >= 0 and (positions.ndim > 1 or (np.diff(positions) > 0).all()))


def common_prefix(left: Array, right: Array) -> int:
    """Return how many rows ``left [n, …]`` and ``right [m, …]`` have in common from the first on."""
    count = min(len(left), len(right))
    same = (left[:count] == right[:count]).reshape(count, -1).all(axis=1) if count else np.ones(0, np.bool_)
    return count if same.all() else int(np.argmin(same))


def _require(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"sampling: {name} is out of range", received=repr(value), expected=expected)


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
