"""A Hugging Face checkpoint through transformers: the reference, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from flashvlm_export.errors import DependencyError, LLMError, SessionError, install_hint
from flashvlm_export.runtime.llm.base import Capabilities, Generation, Limits
from flashvlm_export.runtime.llm.checkpoint import CheckpointLLM, token_ids
from flashvlm_export.runtime.llm.sampling import Sampler
from flashvlm_export.specs import Array


class TransformersLLM(CheckpointLLM):
    """Runs the language model of a checkpoint in float32, whatever it is stored in.

    Args:
        directory: in Hugging Face layout; a vision-language model, of which only the language model is used, or the
            language model alone. Never fetched from anywhere.
        device: of torch: ``cpu`` or ``cuda``.
        threads: threads of one operator, for all of torch in this process; ``None`` leaves it to torch.
    """

    name = "transformers"
    expected = "a directory with config.json and all weights, and memory for them in float32"
    capabilities = Capabilities(
        embeddings=True, explicit_positions=True, batch=False, streaming=True, sampling=True, prefix_reuse=False
    )

    def __init__(self, directory: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(directory)
        self.device = device
        self.threads = threads
        self._model: Any = None

    def _open(self) -> Limits:
        self._require_directory()
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
            from transformers.utils import logging
        except ImportError as error:
            raise DependencyError(
                "the engine 'transformers' is not installed", received=str(error), hint=install_hint("export")
            ) from error
        logging.disable_progress_bar()
        try:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            config: Any = AutoConfig.from_pretrained(self.directory, local_files_only=True)
            kind: Any = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
            model, loading = kind.from_pretrained(
                self.directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            missing = sorted(loading["missing_keys"])
            if missing:  # transformers fills them with random numbers
                raise ValueError(f"{len(missing)} weights are missing, {missing[0]} for one")
            self._model = model.eval().to(self.device)
        except Exception as error:  # transformers, torch and safetensors have no common base
            raise SessionError(
                "transformers cannot load the language model",
                received=f"{self.directory}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                expected=self.expected,
            ) from error
        text = config.get_text_config()
        rows, width = self._model.get_input_embeddings().weight.shape
        axes = len((getattr(text, "rope_parameters", None) or {}).get("mrope_section", [0]))
        return Limits(width, text.max_position_embeddings, rows, token_ids(text.eos_token_id), axes)

    def _close(self) -> None:
        self._model = None

    def embedding_rows(self, token_ids: Array) -> Array:
        """Return rows of the embedding table; see :meth:`LLMEngine.embedding_rows`."""
        import torch

        ids = torch.from_numpy(token_ids)
        rows: Array = self._model.get_input_embeddings().weight[ids.to(self.device)].detach().cpu().numpy()
        return rows

    def _generate(self, generation: Generation) -> Generator[int, None, None]:
        import torch

        sampler, positions = Sampler(generation.params), generation.positions
        given: dict[str, Any] = {"inputs_embeds": torch.from_numpy(np.float32(generation.rows))[None]}
        cache, total = None, 0
        while True:
            total += len(positions)
            placed = torch.from_numpy(positions)[None]  # [1, n], or as transformers has several axes [3, 1, n]
            placed = placed if positions.ndim == 1 else placed.permute(2, 0, 1)
            logits, cache = self._step(given, placed, cache, total)
            token = sampler(logits)
            yield token
            given, positions = {"input_ids": torch.tensor([[token]])}, np.full_like(positions[-1:], positions.max() + 1)

    def _step(self, given: dict[str, Any], positions: Any, cache: Any, total: int) -> tuple[Array, Any]:
        """Run ``given`` at ``positions [..., n]`` behind ``cache``; return the last logits ``[vocab]`` and a cache."""
        import torch

        # The mask says that a gap is none: without, transformers takes it for the start of another sequence.
        inputs = {**given, "position_ids": positions, "attention_mask": torch.ones(1, total, dtype=torch.int64)}
        try:
            with torch.inference_mode():
                output = self._model(
                    **{name: value.to(self.device) for name, value in inputs.items()},
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        except RuntimeError as error:  # what torch raises when memory ends, and otherwise
            raise LLMError(
                f"transformers failed in the language model behind {total - positions.shape[-1]} tokens",
                received=(str(error).splitlines() or [type(error).__name__])[0],
                hint="keep fewer visual tokens (a smaller budget), or use a device with more memory",
            ) from error
        logits: Array = output.logits[0, -1].float().cpu().numpy()
        return logits, output.past_key_values
