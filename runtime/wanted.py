"""What is to be selected of each image and each video of a request: the pictures to encode, and how much of each stays.

A video is the pictures of its moments, one after the other, which share its budget; what is left of them is one value,
as of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flashvlm_export.errors import BudgetError
from flashvlm_export.manifest import VideoSettings
from flashvlm_export.runtime.images import ImageSource, content_key
from flashvlm_export.runtime.layout import ImageLayout, clip, with_newline_at_end
from flashvlm_export.runtime.request import Pruning, SelectedImage
from flashvlm_export.runtime.sessions.split import EncodedImage
from flashvlm_export.runtime.video import Video, frames_differ
from flashvlm_export.selection.config import FlashVLMConfig
from flashvlm_export.selection.flashvlm_numpy import token_relevance
from flashvlm_export.specs import Array, check_budget

# Of a video's visual tokens, where nothing is said: 128 of 576 in the paper.
_KEPT_SHARE = 2 / 9


@dataclass(frozen=True)
class Picture:
    """What the encoder sees as one: an image, alone or one of several in its conversation, or a moment of a video."""

    frames: tuple[ImageSource, ...]
    seen_as: Literal["image", "one of several", "moment"]

    @property
    def key(self) -> str:
        """Equal for what the encoder makes the same of."""
        return " ".join([self.seen_as, *map(content_key, self.frames)])


@dataclass(frozen=True)
class Wanted:
    """An image or a video to select from.

    Attributes:
        pictures: one, or the moments of a video.
        guide: text rows ``[L, D]`` that guide the selection.
        budget: visual tokens to keep of all of them; ``None`` for the usual share of a video's.
        pruning: what was asked for.
        times: of a video's moments, in steps of the time axis; empty for an image.
    """

    pictures: Sequence[Picture]
    guide: Array
    budget: int | None
    pruning: Pruning
    times: Sequence[int] = ()

    def budgets(
        self, layouts: Sequence[ImageLayout], encoded: Sequence[EncodedImage], config: FlashVLMConfig
    ) -> list[int]:
        """Return how many visual tokens of each picture are kept.

        Args:
            layouts: of each.
            encoded: what is remembered of each, to divide a video's budget by relevance.
            config: what relevance is.

        Raises:
            VideoError: if the frames of a video differ in size.
        """
        if len({layout.grids for layout in layouts}) > 1:
            raise frames_differ([f"{layout.grids[0]} visual tokens" for layout in layouts])
        counts = [layout.num_tokens for layout in layouts]
        if not self.times:
            return [min(self.budget or counts[0], counts[0])]
        total = self.budget or max(len(counts), round(_KEPT_SHARE * sum(counts)))
        weights = np.full(len(counts), 1 / len(counts))
        if self.pruning.division == "relevance":
            weights = weights + relevance([image.projected_tokens for image in encoded], self.guide, config)
        return divided(min(total, sum(counts)), weights.tolist(), counts)

    def joined(self, kept: Sequence[tuple[ImageLayout, Array, Array, Array]], newline: Array | None) -> SelectedImage:
        """Return what is left of all pictures as one: of each its layout, kept tokens, their indices, and scores."""
        layouts, tokens, indices, scores = zip(*kept, strict=True)
        layout: ImageLayout = clip(layouts, self.times) if self.times else layouts[0]
        if self.times and newline is not None:
            layout = with_newline_at_end(layout)
        before = np.cumsum([0, *(each.num_tokens for each in layouts[:-1])])
        together = np.concatenate([part + start for part, start in zip(indices, before, strict=True)])
        rows = layout.spread(together, np.concatenate(tokens), newline)
        return SelectedImage(*rows, together, np.concatenate(scores), layout)


def want_image(source: ImageSource, guide: Array, pruning: Pruning, *, usual: int, most: int, several: bool) -> Wanted:
    """Return what is to be selected of one image.

    Args:
        source: the image.
        guide: text rows ``[L, D]``.
        pruning: what is asked for.
        usual: budget where nothing is said.
        most: the largest budget.
        several: the model sees it as one of several.

    Raises:
        BudgetError: if the budget is not 1 to ``most``.
    """
    asked_for = usual if pruning.budget is None else pruning.budget
    budget = most if asked_for == "full" else check_budget(asked_for, most)
    seen_as: Literal["image", "one of several"] = "one of several" if several else "image"
    return Wanted([Picture((source,), seen_as)], guide, budget, pruning)


def want_video(video: Video, guide: Array, pruning: Pruning, settings: VideoSettings, *, most_each: int) -> Wanted:
    """Return what is to be selected of a video, whose moments have at most ``most_each`` visual tokens.

    Raises:
        BudgetError: if the budget is less than one token for each moment, or more than there can be.
    """
    step, frames = settings.frames_per_moment, video.frames
    moments = [Picture(tuple(frames[start : start + step]), "moment") for start in range(0, len(frames), step)]
    if isinstance(pruning.budget, int) and pruning.budget < len(moments):
        raise BudgetError(
            "the token budget is too small for the video",
            received=pruning.budget,
            expected=f"at least 1 for each of its {len(moments)} moments ({len(frames)} frames)",
            hint="keep more visual tokens, or take fewer frames",
        )
    most = len(moments) * most_each
    budget = most if pruning.budget == "full" else pruning.budget
    if budget is not None:
        check_budget(budget, most, f"{len(moments)} moments at most")
    # In float32, as transformers counts them.
    interval = np.float32(settings.steps_per_second * step / video.fps)
    times = (np.arange(len(moments), dtype=np.float32) * interval).astype(np.int64)
    return Wanted(moments, guide, budget, pruning, times.tolist())


def divided(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Return ``total`` divided in proportion to ``weights``: at least 1 each, at most ``most``.

    Args:
        total: at least as many as there are weights, at most the sum of ``most``.
        weights: 0 or more; where all that can still grow are 0 they count the same.
        most: 1 or more each.
    """
    limits, given = np.asarray(most), np.ones(len(most), np.int64)
    while (rest := total - int(given.sum())) > 0:
        weighed = np.where(given < limits, np.asarray(weights, np.float64), 0.0)
        if weighed.sum() == 0:
            weighed = (given < limits).astype(np.float64)
        ideal = rest * weighed / weighed.sum()
        more = np.minimum(np.floor(ideal).astype(np.int64), limits - given)
        if not more.any():  # the rest goes to the largest fractions, one each
            order = np.argsort(-ideal, kind="stable")
            more[[place for place in order if weighed[place] > 0][:rest]] = 1
        given += more
    return [int(count) for count in given]


def relevance(moments: Sequence[Array], text: Array, config: FlashVLMConfig) -> Array:
    """Return the share of each moment in the relevance of all their visual tokens to a question: float64, sum 1.

    A token's relevance is FlashVLM's (arXiv 2512.20561), sharpened by a softmax over the tokens of all moments.

    Args:
        moments: of each ``[N, D]``, its projected visual tokens.
        text: ``[L, D]``, embeddings; of none, all moments are alike.
        config: weights of the text, and both temperatures.
    """
    if not len(text):
        return np.full(len(moments), 1 / len(moments))
    text = text.astype(np.float64)
    alike = [token_relevance(tokens.astype(np.float64), text, config) for tokens in moments]
    best = max(float(each.max()) for each in alike)
    mass = np.array([np.exp((each - best) / config.sharpening_temperature).sum() for each in alike])
    return np.asarray(mass / mass.sum())
