"""What the report compares: PyTorch, and a bundle in each backend. Each is made and called in a process of its own.

A backend answers the pair ``index`` of image and question with ``budget`` visual tokens and returns a :class:`Run`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import list_engines
from flashvlm_export.errors import DependencyError, install_hint
from flashvlm_export.specs import Array

Pair = tuple[Path, str]


@dataclass(frozen=True)
class Timing:
    """How long one question about one image took.

    Attributes:
        stage_ms: milliseconds of each stage, in order.
        prompt_tokens: that the language model read; 0 without one.
        decoded: steps of decoding after the first token.
    """

    stage_ms: dict[str, float]
    prompt_tokens: int = 0
    decoded: int = 0


@dataclass(frozen=True)
class Run:
    """One question about one image.

    Attributes:
        timing: how long it took.
        tokens: float32 ``[K, D]``, the kept visual tokens.
        features: float32 ``[N, C]``, patch features; PyTorch only.
        indices: int64 ``[K]``: which they are.
        scores: ``[N]``.
        token_ids: of the answer, without its end; empty without a language model.
        text: of the answer.
    """

    timing: Timing
    tokens: Array
    features: Array | None
    indices: Array
    scores: Array
    token_ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Backend:
    """A way to run the bundle.

    Attributes:
        name: for tables.
        precision: of its graph.
        options: for ``Pipeline.open``.
    """

    name: str
    precision: str
    options: Mapping[str, Any]


def backends_of(bundle: Bundle) -> list[Backend]:
    """Return every graph on ONNX Runtime's CPU and CUDA providers, where there, and every engine.

    Beside an engine the decoder runs on CUDA where ONNX Runtime has it, and the backend's name says where.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CPUExecutionProvider", "CUDAExecutionProvider") if name in available]
    found = []
    for provider in providers:
        name = f"ONNX Runtime {provider.removesuffix('ExecutionProvider')}"
        found += [
            Backend(name, precision, {"precision": precision, "providers": (provider,)})
            for precision in bundle.manifest.graphs
        ]
    for engine in list_engines(bundle):
        entry = engine.entry
        options = {"engine": entry.target, "precision": entry.precision, "providers": (providers[-1],)}
        decoder = f", decoder {providers[-1].removesuffix('ExecutionProvider')}" if bundle.manifest.decoder else ""
        found.append(Backend(f"{entry.backend} {entry.target}{decoder}", entry.precision, options))
    return found


def make_session(
    backend: Backend, bundle: Path, pairs: Sequence[Pair], max_tokens: int, threads: int
) -> Callable[[int, int], Run]:
    """Return the bundle's pipeline in ``backend`` as a function of pair and budget."""
    from flashvlm_export.runtime.llm.base import SamplingParams
    from flashvlm_export.runtime.pipeline import Pipeline
    from flashvlm_export.runtime.request import Request

    opened = Bundle.open(bundle)
    has_llm = opened.manifest.decoder is not None
    pipeline = Pipeline.open(opened, threads=threads, llm="onnxruntime" if has_llm else None, **backend.options)
    pipeline.load()
    params = SamplingParams(max_new_tokens=max_tokens)

    def run(index: int, budget: int) -> Run:
        image, question = pairs[index]
        (prompt,) = pipeline.encode([Request([image], question)], budget=budget)
        kept = prompt.images[0]
        visual = Run(Timing(prompt.stage_ms), kept.tokens, None, kept.indices, kept.scores)
        if not has_llm:
            return visual
        answer = pipeline.answer(prompt, params)
        # The step that found the end of the answer is timed, but hands out no token.
        decoded = answer.stats.new_tokens - (answer.stats.finish_reason != "stop")
        timing = Timing(answer.stage_ms, answer.stats.prompt_tokens, decoded)
        return replace(visual, timing=timing, token_ids=answer.token_ids, text=answer.text)

    return run


def make_pytorch(
    bundle: Path, checkpoint: Path, pairs: Sequence[Pair], max_tokens: int, threads: int
) -> Callable[[int, int], Run]:
    """Return the same in PyTorch: transformers' model in float32, the selector's torch module between its two halves.

    It runs on the CPU. The vision tower has eager attention, since the selection needs an attention map, the language
    model scaled dot-product attention. Reading and preprocessing the image and tokenising are the runtime's, which are
    those of the checkpoint to the last bit.
    """
    try:
        import torch

        from flashvlm_export.export.reference import make_reference
    except ImportError as error:
        hint = install_hint("report")
        raise DependencyError("the report compares with PyTorch", received=str(error), hint=hint) from error

    from flashvlm_export.runtime.embeddings import splice
    from flashvlm_export.runtime.graph_inputs import GraphInputs, visual_feeds
    from flashvlm_export.runtime.images import load_image
    from flashvlm_export.runtime.pipeline import Clock, prompt_positions
    from flashvlm_export.runtime.request import SelectedImage
    from flashvlm_export.selection import get_selector

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    opened = Bundle.open(bundle)
    inputs, manifest = GraphInputs(opened), opened.manifest
    prompts: Any = inputs.prompts
    selector = get_selector(manifest.selection.selector)
    select = selector.make_module(selector.make_config(manifest.selection.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice on generation settings
        reference = make_reference(checkpoint, language_attention="sdpa", like=opened)
    ends = set(manifest.prompt.eos_token_ids) if manifest.prompt else set()

    def run(index: int, budget: int) -> Run:
        image, question = pairs[index]
        clock = Clock()
        prompt = prompts.chat(question)
        rows = inputs.embeddings.lookup(prompt.text_ids("prompt"), np.float32)
        clock.lap("tokenize")
        loaded = load_image(image)
        clock.lap("load_images")
        prepared = inputs.prepare(loaded)
        feeds = visual_feeds([prepared], [rows], min(budget, prepared.layout.num_tokens))
        clock.lap("preprocess")
        features, saliency, tokens = reference.encode_image(loaded, feeds["pixel_values"])
        clock.lap("vision")
        given = (features, saliency, tokens, feeds["text_embeds"], feeds["text_mask"], feeds["budget"])
        marked, scores = select(*map(torch.from_numpy, given))
        indices = np.flatnonzero(marked[0].numpy())
        clock.lap("selection")
        kept = tokens[0][indices]
        rows_and_places = prepared.layout.spread(indices, kept, inputs.newline)
        selected = SelectedImage(*rows_and_places, indices, scores[0].numpy(), prepared.layout)
        text = inputs.embeddings.lookup(prompt.token_ids, np.float32)
        spliced = splice(text, prompt.image_positions, [selected.rows])
        positions = prompt_positions(prompt, [selected], manifest.position_axes, manifest.default_positions)
        clock.lap("splice")
        visual = Run(Timing(clock.laps_ms), kept, features[0], indices, scores[0].numpy())
        if manifest.decoder is None:
            return visual
        ids: list[int] = []
        for token in reference.stream(spliced, positions, max_tokens):
            clock.lap("decode" if ids else "prefill")
            ids.append(token)
            if token in ends:
                break
        decoded = len(ids) - 1
        if ids[-1] in ends:
            ids.pop()
        timing = Timing(clock.laps_ms, len(spliced), decoded)
        return replace(visual, timing=timing, token_ids=ids, text=prompts.tokenizer.decode(ids))

    return run
