"""The bundle's decoder in ONNX Runtime, with a KV cache that is written in place.

GroupQueryAttention, which ``export/decoder.py`` has the model builder write, appends to its cache without a copy when
past and present are bound to one buffer as long as the whole answer; ``attention_mask`` tells how much of it counts.
Decode is bound by memory bandwidth, so the copy shows: 12 layers of width 1024 behind 640 prompt tokens took 8.4 ms per
token in int4 instead of 15 ms with caches fed back as outputs (fp32: 27 instead of 35; 2 CPU cores).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashvlm_export.errors import LLMError, SessionError
from flashvlm_export.manifest import DecoderEntry
from flashvlm_export.memory import physical_bytes
from flashvlm_export.ort import ort_session
from flashvlm_export.runtime.llm.base import (
    Capabilities,
    Embed,
    Generation,
    Limits,
)
from flashvlm_export.runtime.llm.batching import Answer, BatchingLLM
from flashvlm_export.specs import Array

_DTYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class _Cache:
    """Keys and values of the answers under way, each in a slot of its own.

    Attributes:
        arrays: ``[slots, heads, capacity, head size]`` per half of a layer; on the CPU ONNX Runtime works in their
            memory, of which the system gives as much as is written.
        values: the same as ONNX Runtime's.
        bindings: what runs a range of slots, by the first and the number of them.
    """

    arrays: list[Array]
    values: list[Any]
    bindings: dict[tuple[int, int], Any] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """Answers that it has room for."""
        return int(self.arrays[0].shape[0])

    @property
    def capacity(self) -> int:
        """Positions of a slot."""
        return int(self.arrays[0].shape[2])


class OnnxRuntimeLLM(BatchingLLM):
    """Runs ``model_file``, a decoder with GroupQueryAttention that takes ``inputs_embeds``.

    Args:
        model_file: ONNX file of the bundle.
        entry: what the manifest says of it.
        embed: embedding rows of generated tokens.
        providers: execution providers in order of preference; the first one has to be available.
        threads: threads of one operator; ``None`` leaves it to ONNX Runtime.
    """

    name = "onnxruntime"
    capabilities = Capabilities(
        embeddings=True, explicit_positions=True, batch=True, streaming=True, sampling=True, prefix_reuse=True
    )

    def __init__(
        self,
        model_file: Path,
        entry: DecoderEntry,
        embed: Embed,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        super().__init__(embed)
        self.model_file = model_file
        self.entry = entry
        self.providers = tuple(providers)
        self.threads = threads
        self._session: Any = None
        self._cache: _Cache | None = None
        self._dtype: type[np.floating[Any]] = np.float32

    def _open(self) -> Limits:
        session = ort_session(self.model_file, providers=self.providers, threads=self.threads)
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name for value in session.get_outputs()}
        caches = self._cache_names()
        needed = {"inputs_embeds", "attention_mask", "position_ids", *(past for past, _ in caches)}
        if (
            inputs.keys() != needed
            or outputs != {"logits", *(present for _, present in caches)}
            or any(inputs[past].shape[1] != self.entry.num_kv_heads for past, _ in caches)
            or inputs["inputs_embeds"].type not in _DTYPES
        ):
            raise SessionError(
                f"{self.model_file.name} is not the decoder that the manifest describes",
                received=", ".join(f"{name}: {value.type}{value.shape}" for name, value in inputs.items()),
                expected=f"inputs_embeds, attention_mask, position_ids and {self.entry.num_layers} layers of "
                f"past_key_values with {self.entry.num_kv_heads} heads",
                hint="export the bundle again",
            )
        self._session = session
        self._dtype = _DTYPES[inputs["inputs_embeds"].type]
        width, vocab_size = inputs["inputs_embeds"].shape[-1], session.get_outputs()[0].shape[-1]
        axes = (*inputs["position_ids"].shape[2:], 1)[0]
        return Limits(width, self.entry.max_positions, vocab_size, position_axes=axes)

    def _close(self) -> None:
        self._session = self._cache = None

    def _prefill(self, answer: Answer) -> Array:
        rows, positions = answer.rows[0], answer.places[0]
        past = self._make_room(answer.generation)
        return self._run(answer.slot, rows[past:][None], positions[past:][None], np.array([len(rows)]))[0]

    def _decode(self, answers: Sequence[Answer], rows: Array) -> Array:
        slots = [answer.slot for answer in answers]
        first, count = min(slots), max(slots) - min(slots) + 1
        # Between them, a free slot has one row, which nobody reads; an answer that does not wait has one at its next
        # place, which its next token is written over.
        given = np.zeros((count, 1, rows.shape[1]), rows.dtype)
        axes = answers[0].places[0].shape[1:]
        places, lengths = np.zeros((count, 1, *axes), np.int64), np.ones(count, np.int64)
        for slot, other in self._answers.items():
            if 0 <= slot - first < count:
                places[slot - first], lengths[slot - first] = other.place, other.past + 1
        chosen = np.array(slots) - first
        given[chosen, 0] = rows
        return self._run(first, given, places, lengths)[chosen]

    def _ended(self) -> None:
        # On a GPU a cache for several answers takes seconds to make.
        if not (self._answers or self._keeps_prefix or (self._on_gpu and self.max_answers > 1)):
            self._cache = None

    def _make_room(self, generation: Generation) -> int:
        """Have a cache with room for an answer; return how many rows of its prompt it holds."""
        needed = len(generation.rows) + generation.params.max_new_tokens
        past, old = self._shared(generation), self._cache
        if old is not None and old.slots >= self.max_answers and old.capacity >= needed:
            return past
        capacity, most = needed, self.entry.max_positions
        if self.max_answers > 1 and self._on_gpu:
            capacity = most  # buffers there cannot be copied into each other from here
        elif self.max_answers > 1 or self.reuse_prefix:
            capacity = min(2 * needed, most)  # the next prompt is longer
        if old is not None and self._answers:
            capacity = max(capacity, old.capacity)
        cache = self._allocate(capacity)
        if self._on_gpu:
            generation.reused_tokens = past = 0
        held = {slot: answer.past for slot, answer in self._answers.items()} or {0: past}
        for target, source in zip(cache.arrays, old.arrays if old is not None else (), strict=False):
            for slot, count in held.items():
                target[slot, :, :count] = source[slot, :, :count]
        self._cache = cache
        return past

    def _run(self, first: int, rows: Array, positions: Array, lengths: Array) -> Array:
        """Run ``rows [n, m, D]`` at ``positions [n, m, …]`` in the slots from ``first`` on.

        They are the last of ``lengths [n]`` rows of each slot. Returns the last logits of each, ``[n, vocab]``.
        """
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        binding = self._binding(first, len(rows))
        given = self._as_input(rows)
        binding.bind_cpu_input("inputs_embeds", given)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        # Bound anew each time: ONNX Runtime would otherwise reuse the last buffer, which may have another length.
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise LLMError(
                f"ONNX Runtime failed in the decoder at {lengths.max()} tokens",
                received=(str(error).splitlines() or [type(error).__name__])[0],
                hint="check the bundle (flashvlm inspect BUNDLE --verify) and the memory that is free",
            ) from error
        logits: Array = binding.get_outputs()[0].numpy()[:, -1]
        return logits

    def _allocate(self, capacity: int) -> _Cache:
        """Return zeros for each half of each layer, with a slot per answer."""
        from onnxruntime import OrtValue

        shape, names = (self.max_answers, self.entry.num_kv_heads, capacity, self.entry.head_size), self._cache_names()
        size = len(names) * math.prod(shape) * np.dtype(self._dtype).itemsize
        try:
            if not self._on_gpu and size > physical_bytes():
                raise MemoryError("more than this machine has")
            arrays = [np.zeros(shape, self._dtype) for _ in names]
            return _Cache(arrays, [OrtValue.ortvalue_from_numpy(array, self._device, 0) for array in arrays])
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise LLMError(
                "there is no memory for keys and values",
                received=f"{size} bytes for {self.max_answers} answer(s) of {capacity} positions: {error}",
                hint="fewer answers at once, a smaller budget, fewer new tokens, or a decoder in fp16",
            ) from error

    def _binding(self, first: int, count: int) -> Any:
        """Return what runs ``count`` slots from ``first`` on, their cache bound as what is read and what is written."""
        cache = self._cache
        assert cache is not None  # _make_room has been called
        if (first, count) not in cache.bindings:
            binding = self._session.io_binding()
            # First of all outputs, so that it stays number 0.
            binding.bind_output("logits", "cpu")
            shape = (count, *cache.arrays[0].shape[1:])
            for (past, present), array, value in zip(self._cache_names(), cache.arrays, cache.values, strict=True):
                place = (self._device, 0, self._dtype, shape, value.data_ptr() + first * array.strides[0])
                binding.bind_input(past, *place)
                binding.bind_output(present, *place)
            cache.bindings[first, count] = binding
        return cache.bindings[first, count]

    @property
    def _on_gpu(self) -> bool:
        return self.providers[0] == "CUDAExecutionProvider"

    @property
    def _device(self) -> str:
        return "cuda" if self._on_gpu else "cpu"

    def _cache_names(self) -> list[tuple[str, str]]:
        return [
            (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
            for layer in range(self.entry.num_layers)
            for kind in ("key", "value")
        ]

    def _as_input(self, rows: Array) -> Array:
        """Return ``rows``, contiguous, in the decoder's dtype."""
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(rows, self._dtype)
        if self._dtype == np.float16 and not np.isfinite(converted).all():
            raise LLMError(
                "the embeddings are too large for a decoder in half precision",
                received=f"magnitudes up to {np.abs(rows).max():.3g}",
                expected="up to 65504",
                hint="use a decoder in fp32, int8 or int4",
            )
        return converted
