"""A GGUF file through llama.cpp: what runs a language model on a Jetson, on the CPU or a GPU, in few bits.

llama-cpp-python's bindings of the C functions, because its own class takes token ids only. The file is converted by the
user from the same checkpoint; its embeddings have to be the bundle's.
"""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashvlm_export.errors import DependencyError, LLMError, SessionError, install_hint
from flashvlm_export.files import sha256_of
from flashvlm_export.runtime.llm.base import Capabilities, Embed, Limits
from flashvlm_export.runtime.llm.batching import Answer, BatchingLLM
from flashvlm_export.specs import Array

_ALL_F32, _TYPE_F32, _FLASH_OFF = 0, 0, 0  # llama_ftype, ggml_type, llama_flash_attn_type
_ERROR = 4  # ggml_log_level

# llama.cpp has one listener for the whole process, and says which model it speaks of to nobody.
_said: collections.deque[str] = collections.deque(maxlen=4)
_listener: Any = None


def _listen(lib: Any) -> None:
    """Keep what llama.cpp reports as errors, and nothing else of what it would print."""
    global _listener
    _said.clear()
    if _listener is not None:
        return

    def hear(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _said.append(text.decode(errors="replace").strip())

    _listener = lib.llama_log_callback(hear)  # llama.cpp does not keep it alive
    lib.llama_log_set(_listener, ctypes.c_void_p(0))


class LlamaCppLLM(BatchingLLM):
    """Runs ``file``.

    Args:
        file: GGUF of a text model.
        embed: embedding rows of generated tokens, by which the next prompt is compared.
        context: positions of prompt and answer together, for which the KV cache of each answer under way is allocated;
            at most what the model was trained with. A file in F32 runs in float32 throughout; otherwise the cache is
            float16.
        gpu: put all layers on the GPU; llama.cpp has to be built for it.
        threads: threads; ``None`` leaves it to llama.cpp.
    """

    name = "llamacpp"
    # Its cache insists on positions without gaps.
    capabilities = Capabilities(
        embeddings=True, explicit_positions=False, batch=True, streaming=True, sampling=True, prefix_reuse=True
    )

    def __init__(
        self, file: Path, embed: Embed, *, context: int = 4096, gpu: bool = False, threads: int | None = None
    ) -> None:
        super().__init__(embed)
        self.file = file
        self.context = context
        self.gpu = gpu
        self.threads = threads
        self._lib: Any = None
        self._model: Any = None
        self._context: Any = None
        self._positions = 0

    def _open(self) -> Limits:
        self._require_file()
        try:
            import gguf  # noqa: F401  # for embedding_rows
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or a library that does not load
            raise DependencyError(
                "the engine 'llamacpp' cannot be loaded", received=str(error), hint=install_hint("llamacpp")
            ) from error
        self._lib = lib = llama_cpp
        _listen(lib)
        try:
            return self._load(lib)
        except BaseException:
            self._close()
            raise

    def _load(self, lib: Any) -> Limits:
        if self.gpu and not lib.llama_supports_gpu_offload():
            raise SessionError(
                "this build of llama.cpp has no GPU support",
                received="--provider cuda",
                hint="CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-deps llama-cpp-python",
            )
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 999 if self.gpu else 0
        self._model = lib.llama_model_load_from_file(str(self.file).encode(), settings)
        if not self._model:
            raise self._failed("llama.cpp cannot load the language model", "a GGUF file of a text model")
        self._positions = min(self.context, lib.llama_model_n_ctx_train(self._model))
        self._make_context()
        vocabulary = lib.llama_model_get_vocab(self._model)
        ends = (lib.llama_vocab_eos(vocabulary), lib.llama_vocab_eot(vocabulary))
        return Limits(
            lib.llama_model_n_embd(self._model),
            self._positions,
            lib.llama_vocab_n_tokens(vocabulary),
            tuple(token for token in ends if token >= 0),
        )

    def _make_context(self) -> None:
        """Have a KV cache with as many sequences as answers may be under way."""
        lib = self._lib
        if self._context:
            if lib.llama_n_seq_max(self._context) == self.max_answers:
                return
            lib.llama_free(self._context)
        settings = lib.llama_context_default_params()
        settings.n_seq_max = self.max_answers
        settings.n_batch = self._positions
        settings.n_ctx = self._positions * self.max_answers
        if lib.llama_model_ftype(self._model) == _ALL_F32:
            # Flash attention rounds to float16 inside, which shows in the fourth digit of a logit.
            settings.type_k = settings.type_v = _TYPE_F32
            settings.flash_attn_type = _FLASH_OFF
        if self.threads is not None:
            settings.n_threads = settings.n_threads_batch = self.threads
        self._context = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            room = f"room for {self.max_answers} answer(s) of {self._positions} positions"
            raise self._failed("llama.cpp has no memory for the KV cache", room)

    def _close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def _require_file(self) -> None:
        if not self.file.is_file():
            raise SessionError(
                "there is no GGUF file at this path", received=str(self.file), expected="a GGUF file of a text model"
            )

    @property
    def identity(self) -> str:
        """The engine and a hash of the file; raises :class:`SessionError` if there is none."""
        self._require_file()
        return f"{self.name} {sha256_of(self.file)[:16]}"

    def embedding_rows(self, token_ids: Array) -> Array | None:
        """Return rows of the file's embedding table, from whatever bits; see :meth:`LLMEngine.embedding_rows`."""
        from gguf import GGUFReader, dequantize

        tensor = next((each for each in GGUFReader(self.file).tensors if each.name == "token_embd.weight"), None)
        if tensor is None:
            return None
        rows: Array = dequantize(tensor.data[token_ids], tensor.tensor_type)
        return rows

    def _prefill(self, answer: Answer) -> Array:
        self._make_context()
        rows, past = np.asarray(answer.rows[0], np.float32), self._shared(answer.generation)
        memory = self._lib.llama_get_memory(self._context)
        if not self._lib.llama_memory_seq_rm(memory, answer.slot, past, -1):  # some caches lose a sequence as a whole
            self._lib.llama_memory_seq_rm(memory, answer.slot, -1, -1)
            answer.generation.reused_tokens = past = 0
        return self._run([(answer.slot, place) for place in range(past, len(rows))], rows=rows[past:])[-1]

    def _decode(self, answers: Sequence[Answer], rows: Array) -> Array:
        return self._run(
            [(answer.slot, answer.past) for answer in answers], tokens=[answer.token for answer in answers]
        )

    def _run(
        self, places: Sequence[tuple[int, int]], *, rows: Array | None = None, tokens: Sequence[int] = ()
    ) -> Array:
        """Run ``rows [n, D]`` or ``tokens``, each at a sequence and a position of it.

        Returns logits: of every token, ``[n, vocab]``; of rows, which are one sequence, of the last, ``[1, vocab]``.
        """
        lib, limits = self._lib, self.limits
        batch = lib.llama_batch_init(len(places), 0 if rows is None else limits.width, 1)
        try:
            batch.n_tokens = len(places)
            if rows is not None:
                ctypes.memmove(batch.embd, np.ascontiguousarray(rows).ctypes.data, rows.nbytes)
            for number, token in enumerate(tokens):
                batch.token[number] = token
            for number, (slot, position) in enumerate(places):
                batch.pos[number] = position
                batch.n_seq_id[number] = 1
                batch.seq_id[number][0] = slot
                batch.logits[number] = rows is None or number == len(places) - 1
            if lib.llama_decode(self._context, batch) != 0:
                raise LLMError(
                    f"llama.cpp failed in the language model at {max(position for _, position in places)} tokens",
                    received=" ".join(_said) or "no message",
                    hint="use a smaller budget, or a file in fewer bits, if memory ended",
                )
        finally:
            lib.llama_batch_free(batch)
        wanted = range(len(places)) if rows is None else (-1,)
        found = [lib.llama_get_logits_ith(self._context, number) for number in wanted]
        return np.stack([np.ctypeslib.as_array(logits, (limits.vocab_size,)) for logits in found])

    def _failed(self, what: str, expected: str) -> SessionError:
        said = " ".join(_said) or "no message"
        return SessionError(what, received=f"{self.file}: {said}", expected=expected)
