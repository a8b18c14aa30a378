"""Images and questions in, answers out: the whole of the runtime in the order in which the data goes.

::

    with Pipeline.open("bundle") as vlm:
        answer = vlm.ask("photo.jpg", "What is in the picture?", budget=128)
        print(answer.text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import BundleError, ConfigError, LLMError, PromptTooLongError, UsageError
from flashvlm_export.manifest import Positions, TextSpan
from flashvlm_export.runtime.embeddings import pad_text, splice, splice_axes, splice_positions
from flashvlm_export.runtime.graph_inputs import GraphInputs, PreparedImage, visual_feeds
from flashvlm_export.runtime.image_cache import ImageCache
from flashvlm_export.runtime.images import ImageSource, load_image
from flashvlm_export.runtime.llm.base import LLMEngine, SamplingParams, counted_positions
from flashvlm_export.runtime.llm.registry import make_llm, require_same_model
from flashvlm_export.runtime.prompt import TokenizedPrompt
from flashvlm_export.runtime.request import (
    Answer,
    Budget,
    Division,
    PrunedPrompt,
    Pruning,
    Request,
    SelectedImage,
    Visual,
    medium_of,
    tokenized,
)
from flashvlm_export.runtime.sessions.base import VisualSession
from flashvlm_export.runtime.sessions.split import EncodedImage, SplitSession
from flashvlm_export.runtime.stop_strings import StopStrings
from flashvlm_export.runtime.video import MOST_FRAMES, Video
from flashvlm_export.runtime.wanted import Picture, Wanted, want_image, want_video
from flashvlm_export.selection import get_selector
from flashvlm_export.selection.config import FlashVLMConfig
from flashvlm_export.specs import Array, Precision

T = TypeVar("T")
K = TypeVar("K")

#: Room for encoded images: 45 of LLaVA-1.5-7B in float16, 22 in float32.
CACHE_BYTES = 256 << 20

# Pictures in float32 at a time, of those that are encoded: the moments of a video are many.
_PREPARED = 16


class Pipeline:
    """Answers questions about images with one visual session and one language model.

    Not thread-safe: one pipeline per thread, sharing the bundle's memory-mapped files, or a :class:`Service
    <flashvlm_export.runtime.service.Service>` for all of them.

    Args:
        bundle: an opened bundle with a tokenizer.
        session: runs its visual graph, or encoder and selectors apart; opened and closed with the pipeline.
        llm: answers; ``None`` if only :meth:`encode` is used.
        cache_bytes: memory for encoded images, which a :class:`SplitSession` need not encode again.
    """

    def __init__(
        self, bundle: Bundle, session: VisualSession, llm: LLMEngine | None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        inputs = GraphInputs(bundle)
        if inputs.prompts is None:
            raise BundleError(
                "the bundle takes no questions: it has no tokenizer",
                received=f"{bundle.path}, exported from {bundle.manifest.source.weights}",
                expected="a bundle exported from a checkpoint with a tokenizer",
                hint="put tokenizer.json beside the weights and export again; a bundle of random weights is for sizing",
            )
        self.bundle = bundle
        self.session = session
        self.llm = llm
        self.images = ImageCache(cache_bytes)
        self.inputs, self.newline = inputs, inputs.newline
        self.embeddings, self.preprocess, self.prompts = inputs.embeddings, inputs.preprocess, inputs.prompts

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        precision: Precision | str | None = None,
        engine: str | None = None,
        cuda_graphs: bool = False,
        selectors: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
        llm: str | None = "onnxruntime",
    ) -> Pipeline:
        """Return a pipeline, opened by ``with`` or :meth:`load`.

        Args:
            bundle: directory, or an opened bundle.
            precision: visual graph to run; ``None`` takes the first the manifest lists, or the engine's.
            engine: target of the TensorRT engine to run, or ``auto`` for its only one, or the one for the GPU at hand;
                ``None`` runs the graph in ONNX Runtime.
            cuda_graphs: replay the engine's kernels as CUDA graphs; see :class:`TensorRTSession`.
            selectors: run encoder and selector as graphs of their own, so that an image is encoded once, with these
                selectors loaded (empty: the fused graph's own); ``None`` runs the fused graph.
            cache_bytes: memory for images encoded so.
            providers: ONNX Runtime execution providers, for the graph (without ``engine``) and the decoder, which
                leaves TensorRT out.
            threads: threads of one operator; ``None`` leaves it to ONNX Runtime.
            llm: engine that answers, see :func:`make_llm`; ``None`` for none.

        Raises:
            BundleError, ConfigError, LLMError, SessionError: see their messages.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        session = _session(bundle, precision, engine, cuda_graphs, selectors, providers, threads)
        pipeline = cls(bundle, session, None, cache_bytes=cache_bytes)
        if llm is not None:
            pipeline.llm = make_llm(llm, bundle, pipeline.embeddings.lookup, providers=providers, threads=threads)
            if bundle.manifest.position_axes > 1 and not pipeline.llm.capabilities.explicit_positions:
                raise _other_positions(pipeline.llm, "counts them by itself", bundle.manifest.position_axes)
        return pipeline

    def load(self, *, visual: bool = True) -> None:
        """Load graph and language model; ``with`` does the same.

        Args:
            visual: without the graph, only images that are selected already can be asked about.
        """
        try:
            if visual:
                self.session.open()
            if self.llm is not None:
                self.llm.open()
                require_same_model(self.llm, self.bundle.manifest, self.embeddings)
                if self.llm.limits.position_axes != self.bundle.manifest.position_axes:
                    received = f"{self.llm.limits.position_axes} number(s) for each token"
                    raise _other_positions(self.llm, received, self.bundle.manifest.position_axes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release graph, language model and the images that are remembered."""
        self.session.close()
        self.images.clear()
        if self.llm is not None:
            self.llm.close()

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image before pruning (``N``), at most where an image is seen in tiles."""
        return self.bundle.manifest.dims.num_patches

    @property
    def default_budget(self) -> int:
        """Token budget the graph was optimised for."""
        return self.session.spec.dim("budget").opt

    def encode(
        self,
        requests: Sequence[Request],
        *,
        budget: Budget | None = None,
        text_span: TextSpan = "prompt",
        positions: Positions | None = None,
        selector: str | None = None,
        division: Division = "evenly",
    ) -> list[PrunedPrompt]:
        """Return one pruned prompt per request; all images go through the graph together.

        Args:
            requests: one or more; a request with several images is selected for each of them.
            budget, text_span, positions, selector, division: see :class:`Pruning`.

        Raises:
            BudgetError, ConfigError, ImageError, LLMError, PromptError, SessionError, UsageError, VideoError: no
                request has a result.
        """
        pruning = Pruning(budget, text_span, positions, selector, division)
        return self.encode_each([(request, pruning) for request in requests])

    def encode_each(self, asked: Sequence[tuple[Request, Pruning]]) -> list[PrunedPrompt]:
        """As :meth:`encode`, with a pruning of its own for each request.

        Images are loaded and encoded together. Selection runs once for each budget and selector among them, as does
        the fused graph.
        """
        if not asked:
            raise UsageError("no requests", expected="at least one image and question")
        clock = Clock()
        prompts = [tokenized(request, self.prompts) for request, _ in asked]
        visuals = [_in_order(request, prompt) for (request, _), prompt in zip(asked, prompts, strict=True)]
        dtype = np.dtype(next(spec.dtype for spec in self.session.spec.inputs if spec.name == "text_embeds"))
        wanted = []
        for (_, pruning), prompt, shown in zip(asked, prompts, visuals, strict=True):
            guide = self.embeddings.lookup(prompt.text_ids(pruning.text_span), dtype)
            several = self.preprocess.settings.pads_several and prompt.media.count("image") > 1
            self._check_selector(pruning)
            mine = [
                self._wanted(each, guide, pruning, prompt, several=several)
                for each in shown
                if not isinstance(each, SelectedImage)
            ]
            self._check_length(shown, pruning, prompt, mine)
            wanted += mine
        clock.lap("tokenize")
        found = iter(self._select(wanted, clock) if wanted else ())
        spliced = []
        for (_, pruning), prompt, shown in zip(asked, prompts, visuals, strict=True):
            images = [each if isinstance(each, SelectedImage) else next(found) for each in shown]
            text_rows = self.embeddings.lookup(prompt.token_ids, np.dtype(np.float32))
            embeds = splice(text_rows, prompt.image_positions, [image.rows for image in images])
            where = prompt_positions(prompt, images, self.bundle.manifest.position_axes, self._positions(pruning))
            spliced.append((embeds, where, prompt, images))
        clock.lap("splice")
        return [PrunedPrompt(*parts, dict(clock.laps_ms)) for parts in spliced]

    def _positions(self, pruning: Pruning) -> Positions:
        return pruning.positions or self.bundle.manifest.default_positions

    def _check_selector(self, pruning: Pruning) -> None:
        if isinstance(self.session, SplitSession):
            self.session.loaded(pruning.selector)
        elif pruning.selector is not None:
            raise UsageError(
                "the fused graph has its selector inside",
                received=repr(pruning.selector),
                expected="a pipeline with selectors",
            )

    def _wanted(
        self, visual: ImageSource | Video, guide: Array, pruning: Pruning, prompt: TokenizedPrompt, *, several: bool
    ) -> Wanted:
        """Return what is to be selected of ``visual``; raise where that cannot be."""
        if not isinstance(visual, Video):
            # Beside a video, whose budget may be larger than any image, an image that has fewer tokens keeps them all.
            most = self.visual_tokens * (MOST_FRAMES if "video" in prompt.media else 1)
            return want_image(visual, guide, pruning, usual=self.default_budget, most=most, several=several)
        if pruning.division == "relevance" and not isinstance(self.session, SplitSession):
            raise UsageError(
                "how relevant the moments of a video are does not show in the fused graph, which selects at once",
                received="division by relevance",
                expected="a pipeline with selectors: --selector NAME, of a bundle exported with --split",
                hint="or divide the budget evenly",
            )
        assert self.inputs.video is not None  # a prompt with a video is refused without
        return want_video(visual, guide, pruning, self.inputs.video, most_each=self.visual_tokens)

    def _check_length(
        self, shown: Sequence[Visual], pruning: Pruning, prompt: TokenizedPrompt, wanted: Sequence[Wanted]
    ) -> None:
        """Raise :class:`LLMError` if the prompt leaves the language model no room to answer, whatever is kept."""
        if self.llm is None:
            return
        images, most = shown, self.llm.limits.max_positions - 1
        gaps, manifest = self._positions(pruning) == "original", self.bundle.manifest
        known = [image for image in images if isinstance(image, SelectedImage)]
        # With three axes an image takes as many positions as its longer side has tokens.
        unpruned = [
            int(image.layout.axes().max()) + 1 if manifest.position_axes > 1 else image.layout.length for image in known
        ]
        chosen = unpruned if gaps else [len(image.rows) for image in known]
        text, open_images = len(prompt.token_ids) - len(images), len(wanted)
        # Where images differ, how many tokens one has shows when it is opened.
        least = 1 if gaps and manifest.position_axes > 1 else manifest.dims.least_patches
        least_each = []
        for each in wanted:
            whole = max(least * len(each.pictures), each.times[-1] + 1 if each.times and gaps else 0)
            least_each.append(whole if gaps else min(each.budget or len(each.pictures), whole))
        length = text + sum(chosen) + sum(least_each)
        if length <= most:
            return
        noun = "image or video" if "video" in prompt.media else "image"
        fitting = (most - text - sum(chosen)) // open_images if open_images else 0
        fitting = min(fitting, max((len(each.pictures) for each in wanted), default=0) * self.visual_tokens)
        raise PromptTooLongError(
            "the prompt is too long for the language model",
            received=f"{length} positions: {text} of text, {length - text} of {len(images)} {noun}(s)"
            + (", pruned or not, as kept tokens stand where they stood" if gaps else ""),
            expected=f"at most {most}, and one for the answer",
            hint=f"keep at most {fitting} visual tokens of an {noun}, with contiguous positions"
            if fitting > 0
            else f"fewer {noun}s, or {length - most} tokens less of text",
        )

    def _select(self, wanted: Sequence[Wanted], clock: Clock) -> list[SelectedImage]:
        """Return what is left of each; pictures that are selected alike in batches as large as the graph takes."""
        pictures, session = [picture for each in wanted for picture in each.pictures], self.session
        encoded = self._encoded(pictures, clock) if isinstance(session, SplitSession) else []
        prepared = [] if isinstance(session, SplitSession) else self._prepared(pictures, clock)
        layouts = [image.layout for image in encoded or prepared]
        owners = [each for each in wanted for _ in each.pictures]
        budgets: list[int] = []
        for each in wanted:
            mine = slice(len(budgets), len(budgets) + len(each.pictures))
            budgets += each.budgets(layouts[mine], encoded[mine], self._relevance(each.pruning))

        def how(place: int) -> tuple[int, int, str | None]:
            return layouts[place].num_tokens, budgets[place], owners[place].pruning.selector

        kept: dict[int, tuple[Array, Array, Array]] = {}
        for (_, budget, selector), places in self._batches(range(len(pictures)), how):
            guides = [owners[place].guide for place in places]
            if isinstance(session, SplitSession):
                images = [encoded[place] for place in places]
                outputs = session.select(images, *pad_text(guides), budget, selector)
            else:
                outputs = session.run(visual_feeds([prepared[place] for place in places], guides, budget))
            rows = zip(outputs.tokens.astype(np.float32), outputs.indices, outputs.scores, strict=True)
            kept.update(zip(places, rows, strict=True))
        clock.lap("select" if encoded else "visual")
        parts = iter([(layouts[place], *kept[place]) for place in range(len(pictures))])
        return [each.joined([next(parts) for _ in each.pictures], self.newline) for each in wanted]

    def _relevance(self, pruning: Pruning) -> FlashVLMConfig:
        """Return what relevance is for the selector that is asked for, or FlashVLM's own where it knows none."""
        if isinstance(self.session, SplitSession):
            name = self.session.loaded(pruning.selector)
            config = get_selector(name).make_config(self.session.halves.selectors[name].config)
            if isinstance(config, FlashVLMConfig):
                return config
        return FlashVLMConfig()

    def _prepared(self, pictures: Sequence[Picture], clock: Clock) -> list[PreparedImage]:
        prepared = []
        for picture in pictures:  # one after the other: decoded, a picture can be as large as a thousand prepared ones
            frames = [load_image(frame) for frame in picture.frames]
            clock.lap("load_images")
            prepared.append(
                self.inputs.prepare_moment(frames)
                if picture.seen_as == "moment"
                else self.inputs.prepare(frames[0], several=picture.seen_as == "one of several")
            )
            clock.lap("preprocess")
        return prepared

    def _encoded(self, pictures: Sequence[Picture], clock: Clock) -> list[EncodedImage]:
        """Return every picture encoded: as it is remembered, or else anew."""
        assert isinstance(self.session, SplitSession)
        keys = [picture.key for picture in pictures]
        found: dict[str, EncodedImage | None] = {key: self.images.get(key) for key in keys}
        clock.lap("image_keys")
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if found[key] is None}
        if missing:
            self._encode(missing, found, clock)
        return [image for key in keys if (image := found[key]) is not None]

    def _encode(self, missing: dict[str, Picture], found: dict[str, EncodedImage | None], clock: Clock) -> None:
        """Put every image of ``missing`` into ``found``, and into what is remembered."""
        assert isinstance(self.session, SplitSession)
        for part in range(0, len(missing), _PREPARED):
            keys = list(missing)[part : part + _PREPARED]
            prepared = dict(zip(keys, self._prepared([missing[key] for key in keys], clock), strict=True))
            counts = {key: image.layout.num_tokens for key, image in prepared.items()}
            for _, batch in self._batches(keys, counts.__getitem__):
                for key, fresh in zip(batch, self.session.encode([prepared[key] for key in batch]), strict=True):
                    found[key] = fresh
                    self.images.put(key, fresh)
            clock.lap("encode")

    def _batches(self, items: Sequence[T], alike: Callable[[T], K]) -> Iterator[tuple[K, list[T]]]:
        """Yield ``items`` that are ``alike`` in parts that the graph takes as one batch."""
        most = self.session.spec.dim("batch").max
        groups: dict[K, list[T]] = {}
        for item in items:
            groups.setdefault(alike(item), []).append(item)
        for how, group in groups.items():
            for start in range(0, len(group), most):
                yield how, group[start : start + most]

    def views(self, shown: ImageSource | Video) -> list[Image.Image]:
        """Return an image as the encoder sees it, or the first frame of each moment of a video, for drawing on."""
        if not isinstance(shown, Video):
            return [self.preprocess.view(load_image(shown))]
        step = self.inputs.video.frames_per_moment if self.inputs.video else 1
        return [load_image(frame) for frame in shown.frames[::step]]

    def stream(self, prompt: PrunedPrompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the answer in pieces of text as they come; ``self.llm.last_run`` then holds times and counts.

        Raises:
            LLMError: if the prompt and the answer together are too long for the model.
        """
        with closing(self.generate(prompt.inputs_embeds, prompt.positions, params)) as pieces:
            for _, piece in pieces:
                if piece:
                    yield piece

    def answer(
        self,
        prompt: PrunedPrompt,
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[str], object] = lambda piece: None,
    ) -> Answer:
        """Return the whole answer to a pruned prompt; ``on_text`` hears each piece of text as it comes."""
        steps = self.answering(prompt, params, on_text=on_text)
        return next(answer for answer in steps if answer is not None)

    def answering(
        self,
        prompt: PrunedPrompt,
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[str], object] = lambda piece: None,
    ) -> Generator[Answer | None, None, None]:
        """Check everything now, and yield ``None`` after each token and the answer at last; see :meth:`answer`.

        For answers that take turns, as many as :attr:`LLMEngine.max_answers`. Close the generator to stop early.
        """
        return self._answering(prompt, self.generate(prompt.inputs_embeds, prompt.positions, params), on_text)

    def _answering(
        self,
        prompt: PrunedPrompt,
        pieces: Generator[tuple[int | None, str], None, None],
        on_text: Callable[[str], object],
    ) -> Generator[Answer | None, None, None]:
        pairs = []
        with closing(pieces):
            for token, piece in pieces:
                pairs.append((token, piece))
                if piece:
                    on_text(piece)
                if token is not None:  # the numbers below are to be read before the engine does anything else
                    yield None
        stats = self._require_llm().last_run
        assert stats is not None  # the stream ran to its end
        if stats.finish_reason == "closed":
            raise LLMError(
                "the language model was closed in the middle of an answer", received=f"{len(pairs) - 1} tokens"
            )
        yield Answer(
            text="".join(piece for _, piece in pairs),
            token_ids=[token for token, _ in pairs if token is not None],
            prompt=prompt,
            stats=stats,
            stage_ms={**prompt.stage_ms, "prefill": stats.prefill_ms, "decode": stats.decode_ms},
        )

    def ask(
        self,
        image: ImageSource | Video,
        question: str,
        *,
        budget: Budget | None = None,
        params: SamplingParams | None = None,
        text_span: TextSpan = "prompt",
        positions: Positions | None = None,
        selector: str | None = None,
        division: Division = "evenly",
    ) -> Answer:
        """Return the answer to one question about one image or video; see :meth:`encode` and :meth:`answer`."""
        pruning = Pruning(budget, text_span, positions, selector, division)
        return self.answer(self.encode_each([(Request([image], question), pruning)])[0], params)

    @contextmanager
    def reusing_prefixes(self) -> Iterator[None]:
        """Let the engine, if it can, take over what it computed of the last prompt that was answered like this."""
        llm = self._require_llm()
        llm.reuse_prefix = llm.capabilities.prefix_reuse
        try:
            yield
        finally:
            llm.reuse_prefix = False

    def generate(
        self,
        inputs_embeds: Array,
        positions: Array,
        params: SamplingParams | None = None,
        *,
        stop_token_ids: Collection[int] | None = None,
    ) -> Generator[tuple[int | None, str], None, None]:
        """Check all now; yield ``(token id, text that it completes)``, and at last ``(None, what was held back)``.

        Behind a stop text nothing is yielded, but the tokens of that text are.

        For rows of whatever origin; of the pipeline, only the language model has to be open.

        Args:
            inputs_embeds: floating point ``[S, D]``.
            positions: int64 ``[S]``, or ``[S, 3]``.
            params: how to choose tokens; greedy without.
            stop_token_ids: ids that end the answer; ``None`` for the bundle's.

        Raises:
            LLMError: as :meth:`LLMEngine.generate` does.
        """
        settings = self.bundle.manifest.prompt
        assert settings is not None  # the constructor refuses such bundles
        params = SamplingParams() if params is None else params
        end = settings.eos_token_ids if stop_token_ids is None else stop_token_ids
        tokens = self._require_llm().generate(inputs_embeds, params, stop_token_ids=end, positions=positions)
        return self._pieces(tokens, StopStrings(params.stop))

    def _pieces(
        self, tokens: Generator[int, None, None], stop: StopStrings
    ) -> Generator[tuple[int | None, str], None, None]:
        detokenizer, llm = self.prompts.detokenizer(), self._require_llm()
        with closing(tokens):
            for token in tokens:
                yield token, stop.feed(detokenizer.feed(token))
                if stop.found:
                    break
        if stop.found and llm.last_run is not None:  # to the engine, its reader went away
            llm.last_run = replace(llm.last_run, finish_reason="stop")
        yield None, stop.feed(detokenizer.flush()) + stop.flush()

    def _require_llm(self) -> LLMEngine:
        if self.llm is None:
            raise UsageError("this pipeline was opened without a language model", expected="one that has")
        return self.llm

    def __enter__(self) -> Pipeline:
        self.load()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _other_positions(llm: LLMEngine, received: str, axes: int) -> LLMError:
    return LLMError(
        f"the engine '{llm.name}' has other positions than this model",
        received=received,
        expected=f"{axes} number(s) for each token",
        hint="answer with the bundle's decoder, or with transformers",
    )


def prompt_positions(
    prompt: TokenizedPrompt, images: Sequence[SelectedImage], axes: int, positions: Positions
) -> Array:
    """Return where each row of a spliced prompt stands: int64 ``[S]``, or ``[S, 3]`` where positions have three axes.

    Args:
        prompt: before splicing.
        images: what is left of each of its images.
        axes: numbers of a position.
        positions: see :class:`Pruning`.
    """
    length, placeholders = len(prompt.token_ids), prompt.image_positions
    if positions == "contiguous":
        return counted_positions(length - len(images) + sum(len(image.rows) for image in images), axes)
    if axes > 1:
        return splice_axes(
            length, placeholders, [image.indices for image in images], [image.layout.axes() for image in images]
        )
    lengths = [image.layout.length for image in images]
    return splice_positions(length, placeholders, [image.places for image in images], lengths)


def _in_order(request: Request, prompt: TokenizedPrompt) -> list[Visual]:
    """Return images and videos in the order of their placeholders, where a template writes one kind first."""
    kinds = {kind: [each for each in request.all_images if medium_of(each) == kind] for kind in ("image", "video")}
    left = {kind: iter(each) for kind, each in kinds.items()}
    return [next(left[kind]) for kind in prompt.media]


class Clock:
    """Milliseconds of each stage, in ``laps_ms``."""

    def __init__(self) -> None:
        self.laps_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to ``stage``."""
        now = time.perf_counter()
        self.laps_ms[stage] = self.laps_ms.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now


def _session(
    bundle: Bundle,
    precision: Precision | str | None,
    engine: str | None,
    cuda_graphs: bool,
    selectors: Sequence[str] | None,
    providers: Sequence[str],
    threads: int | None,
) -> VisualSession:
    if cuda_graphs and engine is None:
        raise UsageError(
            "CUDA graphs are for TensorRT engines", received="cuda graphs without an engine", expected="--engine too"
        )
    if engine is not None and selectors is not None:
        raise UsageError(
            "an engine is built of the fused graph",
            received=f"selectors and the engine {engine}",
            expected="one of them",
        )
    if engine is not None:
        from flashvlm_export.engines import find_engine
        from flashvlm_export.runtime.sessions.tensorrt import TensorRTSession

        wanted = None if precision is None else _precision(precision, bundle)
        found = find_engine(bundle, wanted, None if engine == "auto" else engine)
        return TensorRTSession(bundle, found, cuda_graphs=cuda_graphs)
    from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession

    chosen = _precision(precision, bundle)
    if selectors is not None:
        return SplitSession(bundle, chosen, selectors, providers=providers, threads=threads)
    graph = bundle.graph_file(chosen)
    spec = bundle.manifest.graphs[chosen.value].spec
    return OnnxRuntimeSession(graph, spec, providers=providers, threads=threads)


def _precision(wanted: Precision | str | None, bundle: Bundle) -> Precision:
    if wanted is None:
        return Precision(next(iter(bundle.manifest.graphs)))
    try:
        return Precision(wanted)
    except ValueError:
        names: Any = ", ".join(bundle.manifest.graphs)
        raise ConfigError("unknown precision", received=repr(wanted), expected=f"one of {names}") from None
