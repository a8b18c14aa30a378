"""Photographs and questions as inputs of the visual graph.

No session and no language model: a bundle made for sizing, without a tokenizer, works too. Its text is then seeded
rows of the embedding table, which calibration can do with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flashvlm_export.bundle import (
    CHAT_TEMPLATE,
    NEWLINE,
    PREPROCESSOR,
    TEXT_EMBEDDINGS,
    TOKENIZER,
    VIDEO_PREPROCESSOR,
    Bundle,
)
from flashvlm_export.errors import UsageError
from flashvlm_export.preprocessor import decode_preprocessor
from flashvlm_export.runtime.embeddings import Rows, TextEmbeddings, pad_text
from flashvlm_export.runtime.images import ImageSource, load_image
from flashvlm_export.runtime.layout import (
    ImageLayout,
    Size,
    TokenRows,
    interpolated,
    one_picture,
    overview_and_tiles,
    with_newline_at_end,
)
from flashvlm_export.runtime.preprocess import ImagePreprocessor
from flashvlm_export.runtime.prompt import PromptBuilder
from flashvlm_export.runtime.video import frames_differ
from flashvlm_export.specs import Array, Precision, WindowDims
from flashvlm_export.windows import in_windows

# Tokens of a prompt that is made up: as many as a templated question of a dozen words has.
_RANDOM_TEXT = 24


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image ready for the encoder.

    Attributes:
        inputs: by name of the graph's input, arrays that begin with the image's pictures, or its windows.
        layout: of its visual tokens.
        rows: of which of the encoder's rows each visual token is made; ``None`` where an image is one picture, whose
            rows they are.
        part_rows: rows that the encoder makes of a picture or a window.
    """

    inputs: Mapping[str, Array]
    layout: ImageLayout
    rows: TokenRows | None = None
    part_rows: int = 0


def encoder_feeds(images: Sequence[PreparedImage]) -> dict[str, Array]:
    """Return what the encoder takes; ``images`` have as many visual tokens each."""
    arrays = {name: [image.inputs[name] for image in images] for name in images[0].inputs}
    parts = [len(array) for array in arrays["pixel_values"]]
    if "patch_mask" in arrays:  # windows stay with their image: filled up to the same number
        feeds = {name: np.stack([_filled(array, max(parts)) for array in each]) for name, each in arrays.items()}
        before = np.arange(len(images)) * max(parts)
    else:
        feeds = {name: np.concatenate(each) for name, each in arrays.items()}
        before = np.cumsum([0, *parts[:-1]])
    rows = [image.rows for image in images if image.rows is not None]
    if rows:
        offsets = before * images[0].part_rows
        feeds["layout"] = np.stack([each.order + offset for each, offset in zip(rows, offsets, strict=True)])
        weights = [each.weights for each in rows if each.weights is not None]
        if weights:
            feeds["layout_weights"] = np.stack(weights)
    return feeds


def _filled(array: Array, count: int) -> Array:
    return np.pad(array, ((0, count - len(array)), *((0, 0),) * (array.ndim - 1)))


def visual_feeds(images: Sequence[PreparedImage], guides: Sequence[Rows], budget: int) -> dict[str, Array]:
    """Return the inputs of the visual graph.

    Args:
        images: as many visual tokens each.
        guides: per image the text rows ``[L_i, D]`` that guide its selection, in the graph's dtype.
        budget: visual tokens to keep per image.
    """
    text_embeds, text_mask = pad_text(guides)
    return {
        **encoder_feeds(images),
        "text_embeds": text_embeds,
        "text_mask": text_mask,
        "budget": np.array(budget, np.int64),
    }


class GraphInputs:
    """What stands before the visual session: the parts of a bundle that turn images and questions into its inputs.

    Args:
        bundle: an opened bundle.

    Attributes:
        embeddings: the embedding table.
        preprocess: images to ``pixel_values``.
        prompts: questions to tokens; ``None`` without a tokenizer.
        video: how videos are seen; ``None`` where the model takes none.
        newline: float32 ``[D]``, the embedding that ends a line of tiles; ``None`` where images are one picture.

    Raises:
        BundleError: if its tokenizer, embedding table or preprocessor cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.embeddings = TextEmbeddings(bundle.file(TEXT_EMBEDDINGS))
        self.preprocess = ImagePreprocessor(decode_preprocessor(bundle.file(PREPROCESSOR).read_bytes()))
        self._several = ImagePreprocessor(self.preprocess.settings.of_several)
        self.newline: Array | None = np.load(bundle.file(NEWLINE)) if NEWLINE in bundle.manifest.files else None
        self._dims, self.video = bundle.manifest.dims, bundle.manifest.video
        self._frames: ImagePreprocessor | None = None
        if self.video is not None:
            self._frames = ImagePreprocessor(decode_preprocessor(bundle.file(VIDEO_PREPROCESSOR).read_bytes()))
        self.prompts: PromptBuilder | None = None
        if bundle.manifest.prompt is not None:
            template = bundle.file(CHAT_TEMPLATE).read_text(encoding="utf-8")
            self.prompts = PromptBuilder(bundle.file(TOKENIZER), template, bundle.manifest.prompt)

    def text_rows(self, question: str, precision: Precision) -> Rows:
        """Return the embeddings ``[L, D]`` of the whole templated prompt without its image placeholder.

        Raises:
            PromptError: if the question is empty or holds a placeholder.
            UsageError: if the bundle has no tokenizer.
        """
        if self.prompts is None:
            raise UsageError(
                "the bundle cannot read questions: it has no tokenizer",
                received=repr(question),
                expected="a bundle exported from a checkpoint with a tokenizer",
                hint="leave the prompts out: random rows of the embedding table stand in for them",
            )
        return self.embeddings.lookup(self.prompts.chat(question).text_ids("prompt"), precision.float_dtype)

    def random_text_rows(self, seed: int, precision: Precision) -> Rows:
        """Return ``[24, D]`` rows of the embedding table, the same ones for the same ``seed``."""
        ids = np.random.default_rng(seed).integers(0, self.embeddings.vocab_size, _RANDOM_TEXT)
        return self.embeddings.lookup(ids, precision.float_dtype)

    def feeds(self, image: ImageSource, text_rows: Rows, budget: int) -> dict[str, Array]:
        """Return the graph's inputs, of batch 1; an image with fewer visual tokens than ``budget`` keeps them all.

        Raises:
            ImageError: if the image cannot be read.
        """
        prepared = self.prepare(load_image(image))
        return visual_feeds([prepared], [text_rows], min(budget, prepared.layout.num_tokens))

    def prepare(self, image: Image.Image, *, several: bool = False) -> PreparedImage:
        """Return a picture of mode ``RGB`` ready for the encoder; raises as :class:`ImagePreprocessor` does.

        Some models see it otherwise where it is one of ``several`` in a conversation.
        """
        dims = self._dims
        if several and self.preprocess.settings.pads_several:
            layout = with_newline_at_end(one_picture(dims.grid))
            return PreparedImage({"pixel_values": self._several([image])}, layout, *self._rows(dims.grid))
        pixels = self.preprocess([image])
        if dims.windows is not None:
            return _windows(pixels, dims.windows)
        inputs = {"pixel_values": pixels}
        if dims.most_tiles == 1:
            return PreparedImage(inputs, one_picture(dims.grid))
        rows, layout = overview_and_tiles(image.size, self.preprocess.tiles(image.size), dims.grid, dims.most_area)
        return PreparedImage(inputs, layout, rows, math.prod(dims.grid))

    def view_box(self, size: Size, *, several: bool = False) -> tuple[float, float, float, float]:
        """Return what the encoder sees of an image of ``size``, prepared so; see :meth:`ImagePreprocessor.view_box`."""
        return (self._several if several else self.preprocess).view_box(size)

    def prepare_moment(self, frames: Sequence[Image.Image]) -> PreparedImage:
        """Return frames of mode ``RGB`` that the encoder sees together, of which the last may be missing, ready for it.

        Raises:
            UsageError: if the model takes no videos.
            VideoError: if they differ in size.
        """
        dims = self._dims
        if self.video is None or self._frames is None:
            raise UsageError("this model takes no videos", hint="ask about some of its frames as images")
        if len({frame.size for frame in frames}) > 1:
            raise frames_differ([f"{frame.width} x {frame.height}" for frame in frames])
        missing = self.video.frames_per_moment - len(frames)
        pixels = self._frames([*frames, *(frames[-1] for _ in range(missing))])
        if dims.windows is not None:
            return _windows(pixels, dims.windows)
        grid = (-(-dims.grid[0] // self.video.shrinks), -(-dims.grid[1] // self.video.shrinks))
        return PreparedImage({"pixel_values": pixels}, one_picture(grid), *self._rows(grid))

    def _rows(self, grid: Size) -> tuple[TokenRows, int]:
        """Return of which rows the tokens of one picture are made that is scaled down to ``grid``, and their number."""
        numbers = np.arange(math.prod(self._dims.grid)).reshape(self._dims.grid)
        return interpolated(numbers, grid), numbers.size


def _windows(pixels: Array, dims: WindowDims) -> PreparedImage:
    cut = in_windows(pixels, dims)
    inputs = {"pixel_values": cut.patches, "patch_positions": cut.positions, "patch_mask": cut.mask}
    return PreparedImage(inputs, one_picture(cut.grid), TokenRows(cut.order), dims.window_tokens)
