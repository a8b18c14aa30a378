"""What each setting of a selector does to accuracy: one is changed at a time, on the same questions.

Every picture is encoded once by transformers in float32; selection is the NumPy definition, with and without noise of
INT8's size on what it sees; the language model answers from the kept tokens in batches. An answer counts by its first
token, so the data set's answers have to be single tokens, as those of ``benchmarks/tiny`` are. Figures come with paired
95 % intervals against the first row, the defaults. Settle settings on one split, report them on another.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from output import finish

from flashvlm_export.evaluation.compare import compare
from flashvlm_export.evaluation.dataset import Question, read_dataset
from flashvlm_export.evaluation.journal import AnswerLine
from flashvlm_export.export.reference import LlavaReference
from flashvlm_export.progress import Progress
from flashvlm_export.runtime.embeddings import pad_text, splice, splice_positions
from flashvlm_export.runtime.images import load_image
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.prompt import Positions, TextSpan, TokenizedPrompt
from flashvlm_export.selection import get_selector, select_tokens
from flashvlm_export.specs import Array

# Relative to each value's own size: about what INT8 activations do to features, see docs/selection.md.
INT8_NOISE = 1e-2
BATCH = 32


@dataclass(frozen=True)
class Variant:
    """One row of the table: what differs from the defaults."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    selector: str = "flashvlm"
    text_span: TextSpan = "prompt"
    positions: Positions = "contiguous"
    noise: float = 0.0


@dataclass(frozen=True)
class Encoded:
    """One question with its picture: ``features [N,C]``, ``saliency [N]``, ``tokens [N,D]``, float32."""

    question: Question
    prompt: TokenizedPrompt
    features: Array
    saliency: Array
    tokens: Array


def variants(positions: Positions) -> list[Variant]:
    """The defaults with ``positions``, then one change at a time."""
    rows = [Variant("defaults")]
    rows += [Variant(f"{name}={value}", {name: value}) for name, values in SWEEP.items() for value in values]
    rows += [
        Variant("span=question", text_span="question"),
        Variant("defaults, noise", noise=INT8_NOISE),
        Variant("diversity=farthest, noise", {"diversity": "farthest"}, noise=INT8_NOISE),
    ]
    rows = [replace(row, positions=positions) for row in rows]
    others: list[Positions] = [other for other in get_args(Positions) if other != positions]
    return rows + [Variant(f"positions={other}", positions=other) for other in others]


SWEEP: dict[str, Sequence[Any]] = {
    "diversity": ("farthest",),
    "eta": (0.0, 0.25, 0.75, 1.0),
    "relevance_temperature": (0.01, 0.2, 1.0),
    "sharpening_temperature": (0.002, 0.05, 0.2),
    "power": (1.0, 5.0),
    "quantile": (0.0, 0.9),
    "damping": (0.0, 0.5, 1.0),
    "important_ratio": (0.0, 0.25, 0.75, 1.0),
    "merge_step": (1, 32),
}


def encode(
    vlm: Pipeline, reference: LlavaReference, questions: Sequence[Question], progress: Progress
) -> list[Encoded]:
    """Return what selection sees of each question's picture."""
    rows = []
    starts = range(0, len(questions), 8)
    for start in progress.track(list(starts), "batches of pictures"):
        batch = questions[start : start + 8]
        pixels = vlm.preprocess([load_image(question.image) for question in batch])
        rows += [
            Encoded(question, vlm.prompts.chat(question.question), *parts)
            for question, *parts in zip(batch, *reference.encode(pixels), strict=True)
        ]
    return rows


@torch.no_grad()
def first_tokens(
    vlm: Pipeline, model: Any, rows: Sequence[Encoded], variant: Variant, budget: int, noise: np.random.Generator
) -> list[int]:
    """Return the first token of the answer to each of ``rows``."""

    def seen(values: list[Array]) -> Array:
        stacked = np.stack(values)
        return stacked * (1 + variant.noise * noise.standard_normal(stacked.shape)) if variant.noise else stacked

    text = [vlm.embeddings.lookup(row.prompt.text_ids(variant.text_span)) for row in rows]
    kept = select_tokens(
        seen([row.features for row in rows]),
        seen([row.saliency for row in rows]),
        seen([row.tokens for row in rows]),
        *pad_text(text),
        budget,
        get_selector(variant.selector).make_config(variant.settings),
    )
    embeds, places = [], []
    for row, indices in zip(rows, kept, strict=True):
        where, words = row.prompt.image_positions, vlm.embeddings.lookup(row.prompt.token_ids)
        embeds.append(torch.from_numpy(splice(words, where, [row.tokens[indices]])))
        original = splice_positions(len(words), where, [indices], [len(row.tokens)])
        place = original if variant.positions == "original" else np.arange(len(original))
        places.append(torch.from_numpy(place))
    # Padding comes last, where causal attention does not see it.
    padded, positions, real = (
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
        # Without a mask, transformers takes every jump of the positions for the start of another sequence.
        for each in (embeds, places, [torch.ones_like(one) for one in places])
    )
    states = model.model.language_model(
        inputs_embeds=padded, position_ids=positions, attention_mask=real, use_cache=False
    ).last_hidden_state
    ends = torch.tensor([len(one) - 1 for one in embeds])
    logits = model.lm_head(states[torch.arange(len(rows)), ends])
    return [int(token) for token in logits.argmax(-1)]


def word_of(vlm: Pipeline, token: int) -> str:
    """Return one token as text."""
    words = vlm.prompts.detokenizer()
    return words.feed(token) + words.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="of the checkpoint; its tokenizer and preprocessor are used")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="questions as flashvlm eval takes them")
    parser.add_argument("--budgets", default="128,64,32", help="visual tokens to keep")
    parser.add_argument("--positions", choices=get_args(Positions), default="contiguous", help="of every row")
    parser.add_argument("--only", help="rows to run, with semicolons; the defaults always are")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=VALUE,…", help="another row")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # transformers' advice on generation settings
    progress = Progress.on_stderr()
    vlm = Pipeline.open(args.bundle, llm=None)
    reference = LlavaReference(args.checkpoint, language_attention="sdpa")
    questions = read_dataset(args.data).questions
    words = [word_of(vlm, token) for token in range(vlm.embeddings.vocab_size)]
    rows = encode(vlm, reference, questions, progress)
    budgets = [int(text) for text in args.budgets.split(",")]
    every = variants(args.positions)
    unknown = {*(args.only or "defaults").split(";")} - {row.name for row in every}
    if unknown:
        parser.error(f"--only: no such row: {'; '.join(sorted(unknown))}")
    chosen = [row for row in every if args.only is None or row.name in ["defaults", *args.only.split(";")]]
    chosen += [
        Variant(text, dict(pair.split("=") for pair in text.split(",")), positions=args.positions) for text in args.also
    ]
    keys = [str(number) for number in range(len(rows))]
    answers: dict[str, dict[tuple[str, int], AnswerLine]] = {}
    for variant in chosen:
        noise = np.random.default_rng(0)
        found = answers.setdefault(variant.name, {})
        for budget in budgets:
            progress.step(f"{variant.name} at {budget}")
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                said = first_tokens(vlm, reference.model, batch, variant, budget, noise)
                for key, token in zip(keys[start : start + BATCH], said, strict=True):
                    found[key, budget] = AnswerLine(key, budget, key, words[token], 1, "stop")
    figures = compare(questions, keys, budgets, answers, visual_tokens=vlm.visual_tokens, seed=0)
    for row in figures:
        ahead = row.ahead
        print(
            f"{row.selector:32}{row.budget:5}{100 * (row.mean.value or 0):8.1f} %   "
            f"{100 * (ahead.value or 0):+6.1f} [{100 * (ahead.low or 0):+.1f}, {100 * (ahead.high or 0):+.1f}]",
            file=sys.stderr,
        )
    result = {
        "benchmark": "selection_settings",
        "data": args.data.name,
        "questions": len(questions),
        "positions": args.positions,
        "rows": [
            {
                "setting": row.selector,
                "budget": row.budget,
                "mean": row.mean.value,
                "mean_interval": [row.mean.low, row.mean.high],
                "ahead": row.ahead.value,
                "ahead_interval": [row.ahead.low, row.ahead.high],
                "kinds": {kind: found.value for kind, found in row.kinds.items()},
            }
            for row in figures
        ],
    }
    finish(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
