"""Photographs and questions as inputs of the visual graph.

No session and no language model: a bundle made for sizing, without a tokenizer, works too. Its text is then seeded
rows of the embedding table, which calibration can do with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flashvlm_export.bundle import CHAT_TEMPLATE, NEWLINE, PREPROCESSOR, TEXT_EMBEDDINGS, TOKENIZER, Bundle
from flashvlm_export.errors import UsageError
from flashvlm_export.preprocessor import decode_preprocessor
from flashvlm_export.runtime.embeddings import Rows, TextEmbeddings, pad_text
from flashvlm_export.runtime.images import ImageSource, load_image
from flashvlm_export.runtime.layout import ImageLayout, one_picture, overview_and_tiles
from flashvlm_export.runtime.preprocess import ImagePreprocessor
from flashvlm_export.runtime.prompt import PromptBuilder
from flashvlm_export.specs import Array, Precision
from flashvlm_export.windows import in_windows

# Tokens of a prompt that is made up: as many as a templated question of a dozen words has.
_RANDOM_TEXT = 24


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image ready for the encoder.

    Attributes:
        inputs: by name of the graph's input, arrays that begin with the image's pictures, or its windows.
        layout: of its visual tokens.
        part_tokens: visual tokens that the encoder makes of a picture or a window; 0 where an image is one picture,
            whose tokens need no layout.
    """

    inputs: Mapping[str, Array]
    layout: ImageLayout
    part_tokens: int = 0


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
    if images[0].part_tokens:
        orders = np.stack([image.layout.order for image in images])
        feeds["layout"] = orders + before[:, None] * images[0].part_tokens
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
        newline: float32 ``[D]``, the embedding that ends a line of tiles; ``None`` where images are one picture.

    Raises:
        BundleError: if its tokenizer, embedding table or preprocessor cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.embeddings = TextEmbeddings(bundle.file(TEXT_EMBEDDINGS))
        self.preprocess = ImagePreprocessor(decode_preprocessor(bundle.file(PREPROCESSOR).read_bytes()))
        self.newline: Array | None = np.load(bundle.file(NEWLINE)) if NEWLINE in bundle.manifest.files else None
        self._dims = bundle.manifest.dims
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

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Return a picture of mode ``RGB`` ready for the encoder; raises as :class:`ImagePreprocessor` does."""
        dims, pixels = self._dims, self.preprocess([image])
        if dims.windows is not None:
            cut = in_windows(pixels[0], dims.windows)
            inputs = {"pixel_values": cut.patches, "patch_positions": cut.positions, "patch_mask": cut.mask}
            return PreparedImage(inputs, ImageLayout(cut.order, (cut.grid,)), dims.windows.window_tokens)
        inputs = {"pixel_values": pixels}
        if dims.most_tiles == 1:
            return PreparedImage(inputs, one_picture(dims.grid))
        layout = overview_and_tiles(image.size, self.preprocess.tiles(image.size), dims.grid)
        return PreparedImage(inputs, layout, dims.grid[0] * dims.grid[1])
