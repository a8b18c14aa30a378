"""Fewer visual tokens by a smaller picture: what every selector has to beat. Answers as ``flashvlm eval`` records them.

The preprocessed picture is shrunk to ``14 s`` pixels a side, ``s`` the largest number with ``s * s`` at most the budget
(so 169 tokens at 192, 121 at 128, 25 at 32), and goes through transformers' own model with interpolated position
embeddings. Its tokens are not rows of the full picture, so this is no selector and has no graph; with
``--positions original`` each takes the position of the full picture's patch at its middle. Put ``--output`` beside the
selectors' directories, and ``flashvlm eval --selector`` compares it with them.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F

from flashvlm_export.evaluation.dataset import read_dataset
from flashvlm_export.evaluation.evaluate import Ask, Reply, answer_missing, bundle_sha256, parse_budgets, question_keys
from flashvlm_export.evaluation.journal import Journal, RunSettings
from flashvlm_export.export.reference import LlavaReference
from flashvlm_export.progress import Progress
from flashvlm_export.runtime.embeddings import splice, splice_positions
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.prompt import Positions
from flashvlm_export.specs import Array, Precision


def small_tokens(reference: LlavaReference, pixel_values: Array, budget: int) -> Array:
    """Return the visual tokens ``[s * s, D]`` of the picture ``[1, 3, H, W]``, shrunk."""
    config, inner = reference.model.config, reference.model.model
    patch = config.vision_config.patch_size
    side = min(math.isqrt(budget), config.vision_config.image_size // patch) * patch
    pixels = torch.from_numpy(pixel_values)
    if side != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)
    with torch.no_grad():
        seen = inner.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        tokens = inner.multi_modal_projector(seen.hidden_states[config.vision_feature_layer][:, 1:])
    rows: Array = tokens[0].numpy()
    return rows


def middles(side: int, grid: int) -> Array:
    """Return which of ``grid * grid`` patches lie under the middles of ``side * side`` larger ones."""
    steps = ((np.arange(side) + 0.5) * grid / side).astype(np.int64)
    return (steps[:, None] * grid + steps).ravel()


@contextmanager
def asking(bundle: Path, checkpoint: Path, max_tokens: int, positions: Positions) -> Iterator[Ask]:
    """Yield a function that answers one question from a shrunk picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice on generation settings
        reference = LlavaReference(checkpoint, language_attention="sdpa")
    vlm = Pipeline.open(bundle, llm=None)

    def ask(image: Path, question: str, budget: int, selector: str) -> Reply:
        tokenized = vlm.prompts.chat(question)
        tokens = small_tokens(reference, vlm.preprocess([load_image(image)]), budget)
        rows = vlm.embeddings.lookup(tokenized.token_ids, np.dtype(np.float32))
        where = None
        if positions == "original":
            patches = middles(math.isqrt(len(tokens)), math.isqrt(vlm.visual_tokens))
            where = splice_positions(len(rows), tokenized.image_positions, [patches], [vlm.visual_tokens])
        said = reference.generate(splice(rows, tokenized.image_positions, [tokens]), max_tokens, positions=where)
        words = vlm.prompts.detokenizer()
        text = "".join(map(words.feed, said)) + words.flush()
        return Reply(text, len(said), "length" if len(said) == max_tokens else "stop")

    yield ask


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="of the checkpoint; its tokenizer and preprocessor are used")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="questions as flashvlm eval takes them")
    parser.add_argument("--output", type=Path, required=True, help="directory, such as RESULTS/downsampling")
    parser.add_argument("--positions", choices=get_args(Positions), default="contiguous")
    parser.add_argument("--budgets", help="as of flashvlm eval")
    parser.add_argument("--limit", type=int, help="as of flashvlm eval")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    pipeline = Pipeline.open(args.bundle, llm=None)
    budgets = parse_budgets(args.budgets, pipeline.visual_tokens)
    data = read_dataset(args.data)
    data = data if args.limit is None else data.sample(args.limit, args.seed)
    manifest = pipeline.bundle.manifest
    digest = bundle_sha256(pipeline.bundle, Precision(next(iter(manifest.graphs))))
    settings = RunSettings(
        model=manifest.source.model,
        bundle_sha256=digest,
        precision="fp32",
        backend="transformers, pictures made smaller",
        max_new_tokens=args.max_tokens,
        text_span="none",
        positions=args.positions,
        selector="downsampling",
        weights_sha256=manifest.source.weights_sha256,
    )
    progress = Progress.on_stderr()
    keys = question_keys(data.questions, progress)
    with Journal(args.output, settings) as journal:
        answer_missing(
            data.questions,
            keys,
            budgets,
            {"downsampling": journal},
            asking(args.bundle, args.checkpoint, args.max_tokens, args.positions),
            progress,
            visual_tokens=pipeline.visual_tokens,
        )


if __name__ == "__main__":
    main()
