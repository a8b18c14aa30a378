"""What is asked, what is kept of its images, and what is answered: the values that go through a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np

from flashvlm_export.errors import ConfigError, UsageError
from flashvlm_export.manifest import Positions, TextSpan
from flashvlm_export.runtime.images import ImageSource
from flashvlm_export.runtime.layout import ImageLayout
from flashvlm_export.runtime.llm.base import GenerationStats
from flashvlm_export.runtime.prompt import Medium, PromptBuilder, TokenizedPrompt, Turn
from flashvlm_export.runtime.video import Video
from flashvlm_export.specs import Array


@dataclass(frozen=True, eq=False)
class SelectedImage:
    """What is left of one image, or of one video, moment after moment.

    Attributes:
        rows: float32 ``[R, D]``: what stands in the prompt, its kept visual tokens and the newlines of lines that have
            any.
        places: int64 ``[R]``: where each row stands among those of the unpruned image, ascending.
        indices: int64 ``[K]``: which ones of the ``N`` visual tokens are kept, ascending.
        scores: float32 ``[N]``.
        layout: of its visual tokens before pruning.
    """

    rows: Array
    places: Array
    indices: Array
    scores: Array
    layout: ImageLayout

    @property
    def tokens(self) -> Array:
        """Float32 ``[K, D]``: the kept visual tokens, without newlines."""
        return self.rows[np.isin(self.places, self.layout.places_of(self.indices))]

    @property
    def kept_per_grid(self) -> list[int]:
        """Kept visual tokens of each grid of the layout, such as each moment of a video."""
        ends = np.cumsum([rows * columns for rows, columns in self.layout.grids])
        return [int(count) for count in np.diff(np.searchsorted(self.indices, ends), prepend=0)]


#: What a question can be about.
Visual: TypeAlias = ImageSource | Video | SelectedImage
#: Visual tokens to keep, or all of them.
Budget: TypeAlias = int | Literal["full"]
#: How the budget of a video is divided over its moments.
Division = Literal["evenly", "relevance"]


def medium_of(visual: Visual) -> Medium:
    """Return the kind of placeholder that stands for ``visual`` in a prompt."""
    is_video = visual.layout.times if isinstance(visual, SelectedImage) else isinstance(visual, Video)
    return "video" if is_video else "image"


@dataclass(frozen=True)
class Exchange:
    """A question that was answered; see :class:`Request`."""

    images: Sequence[Visual]
    question: str
    answer: str


@dataclass(frozen=True)
class Request:
    """One question about images or videos, or about none.

    Attributes:
        images: paths, bytes, PIL images or arrays, and videos, each kind in the order of its placeholders; or what an
            earlier prompt kept of one, which is then taken as it is.
        question: the user's words; put into the chat template unless ``raw``.
        system: system text for the chat template, if any.
        raw: ``question`` is a whole prompt with its own placeholders.
        history: what was said before, oldest first. Its images come first.
    """

    images: Sequence[Visual]
    question: str
    system: str | None = None
    raw: bool = False
    history: Sequence[Exchange] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.images, (list, tuple)):
            raise UsageError(
                "the images of a request are a list, also where there is one",
                received=type(self.images).__name__,
                expected='such as ["photo.jpg"]',
            )

    @property
    def all_images(self) -> list[Visual]:
        """The images and videos of the conversation, each kind in the order of its placeholders."""
        return [*(image for exchange in self.history for image in exchange.images), *self.images]


def tokenized(request: Request, prompts: PromptBuilder) -> TokenizedPrompt:
    """Return the prompt of ``request``.

    Raises:
        PromptError, UsageError: see :class:`PromptBuilder`; or if a raw prompt comes with more than itself.
    """
    media = [medium_of(image) for image in request.images]
    if not request.raw:
        history = [Turn([*map(medium_of, past.images)], past.question, past.answer) for past in request.history]
        return prompts.chat(request.question, media, request.system, history)
    if request.history or request.system is not None:
        raise UsageError("a raw prompt has history and system text inside", expected="raw, or these")
    return prompts.raw(request.question, media)


@dataclass(frozen=True)
class Pruning:
    """How many visual tokens of each image are kept, which, and where they then stand.

    Attributes:
        budget: visual tokens to keep per image, ``1..N``, or ``full``; ``None`` for what the graph was optimised for.
            An image in tiles may have fewer than the model's most: it then keeps them all. Of a video it is that of
            the whole clip, at least 1 for each moment; ``None`` keeps 22.2 %, as the paper does of an image.
        text_span: text that guides selection: the whole ``prompt``, as the authors do, or the user's ``question``
            alone.
        positions: of the rows: ``contiguous`` closes the gaps that pruning leaves, as the authors do, so that the
            prompt is shorter also for rotary embedding; ``original`` leaves every row where it stood, so that the
            model still knows from where in the image a token comes; ``None`` is contiguous, but original where
            positions have three axes (Qwen2.5-VL), as the authors do there.
        selector: one of those that the pipeline was opened with; ``None`` for the first.
        division: of a video's budget: ``evenly`` over its moments, or half of it by their ``relevance`` to the text,
            which needs a pipeline that encodes and selects apart.

    Raises:
        ConfigError: if there are no such positions, or no such division.
    """

    budget: Budget | None = None
    text_span: TextSpan = "prompt"
    positions: Positions | None = None
    selector: str | None = None
    division: Division = "evenly"

    def __post_init__(self) -> None:
        if self.division not in get_args(Division):
            raise ConfigError("unknown division", received=repr(self.division), expected="evenly or relevance")
        if self.positions not in (None, *get_args(Positions)):
            raise ConfigError("unknown positions", received=repr(self.positions), expected="contiguous or original")


@dataclass(frozen=True)
class PrunedPrompt:
    """A prompt whose images are reduced to their kept visual tokens, ready for prefill.

    Attributes:
        inputs_embeds: float32 ``[S, D]``: text rows with the visual tokens in place of each placeholder.
        positions: int64 ``[S]``, or ``[S, 3]`` with three axes: where each row stands for the language model.
        prompt: the prompt before splicing.
        images: what is left of each image.
        stage_ms: milliseconds of each stage; a batch's shared stages are given in full to each of its prompts.
    """

    inputs_embeds: Array
    positions: Array
    prompt: TokenizedPrompt
    images: list[SelectedImage]
    stage_ms: dict[str, float]

    @property
    def indices(self) -> list[Array]:
        """Per image int64 ``[K]``: which visual tokens were kept, ascending."""
        return [image.indices for image in self.images]

    @property
    def scores(self) -> list[Array]:
        """Per image float32 ``[N]``."""
        return [image.scores for image in self.images]

    @property
    def visual_tokens_before(self) -> int:
        """Visual tokens of all images without pruning."""
        return sum(image.layout.num_tokens for image in self.images)

    @property
    def visual_tokens_kept(self) -> int:
        """Visual tokens of all images after pruning."""
        return sum(len(indices) for indices in self.indices)


@dataclass(frozen=True)
class Answer:
    """What the language model said, and how it came to it."""

    text: str
    token_ids: list[int]
    prompt: PrunedPrompt
    stats: GenerationStats
    stage_ms: dict[str, float] = field(default_factory=dict)
