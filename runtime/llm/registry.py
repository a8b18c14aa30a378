"""The engines by name, as ``--llm NAME`` or ``--llm NAME:WHERE`` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import BundleError, LLMError, UsageError
from flashvlm_export.manifest import Manifest
from flashvlm_export.runtime.embeddings import TextEmbeddings
from flashvlm_export.runtime.llm.base import Embed, LLMEngine

#: Name → what stands behind the colon; empty for what the bundle holds.
ENGINES = {"onnxruntime": "", "transformers": "DIR", "llamacpp": "FILE.gguf", "vllm": "URL|DIR"}


def make_llm(wanted: str, bundle: Bundle, embed: Embed, *, providers: Sequence[str], threads: int | None) -> LLMEngine:
    """Return the engine that ``wanted`` names, not yet open.

    Args:
        wanted: ``onnxruntime``, the bundle's decoder; ``transformers:DIR``, a checkpoint; ``llamacpp:FILE.gguf``;
            ``vllm:URL``, a server; ``vllm:DIR``, a checkpoint in vLLM.
        bundle: whose prompts it answers.
        embed: its embedding rows, for engines that have none.
        providers: ONNX Runtime execution providers; with CUDA among them, the others run there too.
        threads: threads of one operator; ``None`` leaves it to the engine.

    Raises:
        UsageError: if there is no such engine, or it lacks what it runs.
        BundleError: if it is the bundle's decoder and there is none.
    """
    name, colon, where = wanted.partition(":")
    if name not in ENGINES or bool(where) != bool(ENGINES[name]) or (colon and not where):
        known = ", ".join(f"{name}:{what}" if what else name for name, what in ENGINES.items())
        raise UsageError("no such language model engine", received=repr(wanted), expected=f"one of {known}")
    gpu = "CUDAExecutionProvider" in providers
    # Imported here: each of these needs another library.
    if name == "transformers":
        from flashvlm_export.runtime.llm.transformers import TransformersLLM

        return TransformersLLM(Path(where), device="cuda" if gpu else "cpu", threads=threads)
    if name == "llamacpp":
        from flashvlm_export.runtime.llm.llamacpp import LlamaCppLLM

        return LlamaCppLLM(Path(where), embed, gpu=gpu, threads=threads)
    if name == "vllm" and "://" not in where:
        from flashvlm_export.runtime.llm.vllm_offline import VllmOfflineLLM

        return VllmOfflineLLM(Path(where), embed, bundle.manifest.vocab_size)
    if name == "vllm":
        from flashvlm_export.runtime.llm.vllm import VllmLLM

        return VllmLLM(where, embed, bundle.manifest.vocab_size)
    from flashvlm_export.runtime.llm.onnxruntime import OnnxRuntimeLLM

    decoder = bundle.manifest.decoder
    if decoder is None:
        raise BundleError(
            "the bundle has no language model to answer with",
            received=str(bundle.path),
            expected="a bundle with an LLM decoder",
            hint="export it with --decoder int4 (or int8, fp16, fp32), run another engine with --llm, or run with "
            "--visual-only",
        )
    return OnnxRuntimeLLM(
        bundle.file(decoder.file),
        decoder,
        embed,
        providers=[provider for provider in providers if provider != "TensorrtExecutionProvider"],
        threads=threads,
    )


def require_same_model(llm: LLMEngine, manifest: Manifest, embeddings: TextEmbeddings) -> None:
    """Raise :class:`LLMError` unless an opened engine has a bundle's embedding table and ends answers where it does.

    Args:
        llm: the engine.
        manifest: the bundle's.
        embeddings: the bundle's.
    """
    have, want = (llm.limits.vocab_size, llm.limits.width), (embeddings.vocab_size, embeddings.width)
    received, expected = f"embeddings {list(have)}", str(list(want))
    ends, ours_end = llm.limits.eos_token_ids, manifest.prompt.eos_token_ids if manifest.prompt else []
    if ends and ours_end and not {*ends} & {*ours_end}:
        received, expected = f"tokens {list(ends)} end an answer", f"one of {ours_end}"
    elif have == want:
        ids = np.linspace(0, embeddings.vocab_size - 1, min(embeddings.vocab_size, 32)).astype(np.int64)
        theirs, ours = llm.embedding_rows(ids), embeddings.lookup(ids)
        if theirs is None:
            return
        # In four bits a row still points where it pointed, within 0.99; one of another model points anywhere.
        lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
        likeness = float(np.median((theirs * ours).sum(1) / np.maximum(lengths, 1e-12)))
        if likeness >= 0.98:
            return
        received, expected = f"other embeddings: a median cosine of {likeness:.3f}", "0.98 or more"
    raise LLMError(
        "the language model is not the one that the bundle was exported with",
        received=received,
        expected=expected,
        hint=f"give the engine '{llm.name}' the language model of {manifest.source.model}",
    )
