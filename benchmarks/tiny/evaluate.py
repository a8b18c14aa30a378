"""Exact match of a flashvlm-tiny checkpoint over held-out questions, per kind, on all 576 visual tokens.

The answer counts if it is the one word asked for and nothing follows it. Fast by default (bfloat16, the forward pass of
training, which sees the end token too); ``--generate`` goes through transformers' image processor, chat template and
``generate`` in float32 instead. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from data import OBJECT, TEXT, patch_labels, to_patches
from model import ANSWER_STEPS, IDS, VOCABULARY, encode, language_states, project, vision_features
from torch import Tensor
from train import pixels_from_patches
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration


def picture(seed: int) -> np.ndarray:
    """The rendered scene, ``[336, 336, 3]`` uint8."""
    return np.asarray(scenes.render(scenes.make_scene(seed)))


def visual_tokens(model: LlavaForConditionalGeneration, seeds: list[int]) -> Tensor:
    """Projected tokens of whole pictures, ``[B, 576, D]``."""
    pixels = pixels_from_patches(np.stack([to_patches(picture(seed)) for seed in seeds]))
    features = vision_features(model.model.vision_tower, pixels)
    return project(model.model.multi_modal_projector, features[:, 1:])


@torch.no_grad()
def answers_fast(model: LlavaForConditionalGeneration, asked: list[tuple[int, scenes.Question]]) -> list[str]:
    """First word that the model says; with an ellipsis behind it unless the end token follows."""
    tokens = torch.full((len(asked), 1, ANSWER_STEPS), IDS["<pad>"])
    last = []
    for row, (_, question) in enumerate(asked):
        ids = [*encode(question.text), IDS["assistant"], IDS[":"]]
        tokens[row, 0, : len(ids)] = torch.tensor(ids)
        last.append(len(ids) - 1)
    visual = visual_tokens(model, [seed for seed, _ in asked])
    rows, steps = torch.arange(len(asked)), torch.tensor(last)
    _, final = language_states(model.model.language_model, visual, None, tokens)
    first = model.lm_head(final[rows, 0, steps]).argmax(-1)
    tokens[rows, 0, steps + 1] = first
    _, final = language_states(model.model.language_model, visual, None, tokens)
    second = model.lm_head(final[rows, 0, steps + 1]).argmax(-1)
    ended = second == IDS["</s>"]
    return [
        VOCABULARY[word] + ("" if end else " ...") for word, end in zip(first.tolist(), ended.tolist(), strict=True)
    ]


@torch.no_grad()
def answers_generated(
    model: LlavaForConditionalGeneration, directory: Path, asked: list[tuple[int, scenes.Question]]
) -> list[str]:
    """What ``generate`` answers, one question at a time."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    answers = []
    for seed, question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        prompt = prompt.replace("<image>", "<image>" * model.config.image_seq_length)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        pixels = processor(picture(seed), return_tensors="pt")["pixel_values"]
        out = model.generate(**inputs, pixel_values=pixels, do_sample=False, max_new_tokens=4)
        answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@torch.no_grad()
def word_alignment(model: LlavaForConditionalGeneration, count: int = 40) -> dict[str, float]:
    """How near visual tokens lie to the embeddings of the words for what they show (mean cosines).

    ``own``: to the words for its own colour, shape or text. ``other``: to the other words of the same lists.
    ``best``: share of patches of objects whose nearest colour word is their own.
    """
    words = F.normalize(model.model.language_model.embed_tokens.weight.float(), dim=-1)
    lists = {
        "colour": [IDS[word] for word in scenes.COLOURS],
        "shape": [IDS[word] for word in scenes.SHAPES],
        "word": [IDS[word] for word in scenes.WORDS],
    }
    own: dict[str, list[Tensor]] = {name: [] for name in lists}
    other: dict[str, list[Tensor]] = {name: [] for name in lists}
    best = []
    first = scenes.SPLITS["test"][0]
    for seed in range(first, first + count):
        tokens = F.normalize(visual_tokens(model, [seed])[0].float(), dim=-1)
        labels = torch.from_numpy(patch_labels(scenes.make_scene(seed))[0])
        for column, name, kind in ((1, "colour", OBJECT), (2, "shape", OBJECT), (4, "word", TEXT)):
            chosen = (labels[:, 0] == kind) & (labels[:, column] >= 0) & (labels[:, column] < len(lists[name]))
            cosine = tokens[chosen] @ words[lists[name]].T
            mine = F.one_hot(labels[chosen, column], len(lists[name])).bool()
            own[name].append(cosine[mine])
            other[name].append(cosine[~mine])
            if name == "colour":
                best.append(cosine.argmax(-1) == labels[chosen, column])
    result = {f"{name}_own": float(torch.cat(values).mean()) for name, values in own.items()}
    result |= {f"{name}_other": float(torch.cat(values).mean()) for name, values in other.items()}
    result["colour_best"] = float(torch.cat(best).float().mean())
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--generate", action="store_true", help="through transformers' generate, in float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.float32 if args.generate else torch.bfloat16
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=dtype).eval()
    asked = scenes.held_out(args.split, args.count)
    if args.generate:
        answers = answers_generated(model, args.checkpoint, asked)
    else:
        answers = []
        for start in range(0, len(asked), 8):
            answers += answers_fast(model, asked[start : start + 8])
    right = [answer == question.answer for answer, (_, question) in zip(answers, asked, strict=True)]
    result: dict[str, float] = {}
    for kind in scenes.KINDS:
        hits = [hit for hit, (_, question) in zip(right, asked, strict=True) if question.kind == kind]
        result[kind] = round(sum(hits) / len(hits), 4)
        print(f"{kind:<10} {100 * result[kind]:6.1f} %  of {len(hits)}")
    alignment = {} if args.generate else word_alignment(model)
    print(json.dumps({"questions": len(asked), "all": round(sum(right) / len(right), 4), **result, **alignment}))


if __name__ == "__main__":
    main()
