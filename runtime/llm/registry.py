"""The engines by name, as ``--llm NAME`` or ``--llm NAME:WHERE`` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import BundleError, UsageError
from flashvlm_export.runtime.llm.base import Embed, LLMEngine

#: Name → what stands behind the colon; empty for what the bundle holds.
ENGINES = {"onnxruntime": "", "transformers": "DIR"}


def make_llm(wanted: str, bundle: Bundle, embed: Embed, *, providers: Sequence[str], threads: int | None) -> LLMEngine:
    """Return the engine that ``wanted`` names, not yet open.

    Args:
        wanted: ``onnxruntime``, the bundle's decoder, or ``transformers:DIR``, a checkpoint.
        bundle: whose prompts it answers.
        embed: its embedding rows, for engines that have none.
        providers: ONNX Runtime execution providers; with CUDA among them, torch runs there too.
        threads: threads of one operator; ``None`` leaves it to the engine.

    Raises:
        UsageError: if there is no such engine, or it lacks what it runs.
        BundleError: if it is the bundle's decoder and there is none.
    """
    name, colon, where = wanted.partition(":")
    if name not in ENGINES or bool(where) != bool(ENGINES[name]) or (colon and not where):
        known = ", ".join(f"{name}:{what}" if what else name for name, what in ENGINES.items())
        raise UsageError("no such language model engine", received=repr(wanted), expected=f"one of {known}")
    # Imported here: each of these needs another library.
    if name == "transformers":
        from flashvlm_export.runtime.llm.transformers import TransformersLLM

        device = "cuda" if "CUDAExecutionProvider" in providers else "cpu"
        return TransformersLLM(Path(where), device=device, threads=threads)
    from flashvlm_export.runtime.llm.onnxruntime import OnnxRuntimeLLM

    decoder = bundle.manifest.decoder
    if decoder is None:
        raise BundleError(
            "the bundle has no language model to answer with",
            received=str(bundle.path),
            expected="a bundle with an LLM decoder",
            hint="export it with --decoder int4 (or fp16, fp32), run another engine with --llm, or run with "
            "--visual-only",
        )
    return OnnxRuntimeLLM(
        bundle.file(decoder.file),
        decoder,
        embed,
        providers=[provider for provider in providers if provider != "TensorrtExecutionProvider"],
        threads=threads,
    )
