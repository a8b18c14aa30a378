"""Train flashvlm-tiny on a CPU in four stages, each of which resumes where it was stopped.

``vision`` and ``language`` need nothing from each other and may run side by side; ``align`` joins them; ``joint``
trains the whole model on answers alone, on all 576 visual tokens. README.md beside this file says more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import model as model_code
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from data import TEXT, Pictures, patch_labels, question_batch, to_patches
from heads import Codebook, Heads, Probe, places
from model import (
    IDS,
    TOKENS,
    WIDTH,
    language_states,
    make_model,
    project,
    save_checkpoint,
    vision_features,
)
from optimiser import Optimiser
from safetensors.torch import load_file, save_file
from scenes import patch_owners
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

_OTHERS = "training.safetensors"
STAGES = ["vision", "language", "align", "joint"]
WINDOW = 8
_MEAN = torch.tensor(OPENAI_CLIP_MEAN).repeat_interleave(scenes.PATCH**2) * 255
_STD = torch.tensor(OPENAI_CLIP_STD).repeat_interleave(scenes.PATCH**2) * 255


def pixels_from_patches(patches: np.ndarray | Tensor) -> Tensor:
    """Normalised as CLIP does, bfloat16."""
    return ((torch.as_tensor(patches).float() - _MEAN) / _STD).bfloat16()


def answer_loss(model: nn.Module, final: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answer and of the end behind it; ``[B, Q]`` whether the answer is right."""
    last = batch["last"][..., None, None].expand(-1, -1, 1, WIDTH)
    logits = model.lm_head(final.gather(2, last)).squeeze(2).float()
    ends = model.lm_head(final.gather(2, last + 1)).squeeze(2).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch["answer"].flatten())
    end = F.cross_entropy(ends.flatten(0, 1), torch.full_like(batch["answer"], IDS["</s>"]).flatten())
    return loss + 0.1 * end, logits.argmax(-1) == batch["answer"]


@torch.no_grad()
def _whiten(model: nn.Module, pictures: Pictures) -> None:
    """Patch embedding: principal components of patches, brought to similar size, in random directions.

    Edges carry little of the energy of a patch; without this they are learned late.
    """
    patches = np.concatenate([pictures.patches(seed)[::7] for seed in range(240)])
    pixels = (torch.from_numpy(patches).float() - _MEAN) / _STD
    values, vectors = torch.linalg.eigh(pixels.T @ pixels / len(pixels))
    values, vectors = values.flip(0)[:WIDTH], vectors.flip(1)[:, :WIDTH]
    weights = vectors / (values + values[40]).sqrt()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    weights = (turn @ weights.T) * 0.5 / (pixels @ weights).square().mean().sqrt()
    kernel = model.model.vision_tower.embeddings.patch_embedding.weight
    kernel.copy_(weights.view_as(kernel))


class Run:
    """One stage: its parts, its clock, its log and its checkpoint."""

    def __init__(self, args: argparse.Namespace, rates: dict[str, float], trained: tuple[str, ...]) -> None:
        self.args, self.stage = args, args.stage
        self.folder: Path = args.work
        self.model = make_model()
        words = self.model.model.language_model.embed_tokens.weight.detach()
        torch.manual_seed(1)
        self.parts = nn.ModuleDict(
            {"model": self.model, "heads": Heads(), "codebook": Codebook(words), "probe": Probe()}
        )
        self.elapsed, self.step, self.marks = 0.0, 0, (0.0, 0.0)
        self.pictures = Pictures(args.work / "cache")
        for source in args.start:
            self._take(_weights_of(self.folder, source), source)
        if args.stage == "vision" and not args.start:
            self.pictures.refresh()
            _whiten(self.model, self.pictures)
        self.parts["model"].bfloat16()
        self.parts["heads"].bfloat16()
        self.parts["probe"].bfloat16()
        chosen = {n: p for n, p in self.parts.named_parameters() if n.startswith(trained) and ".layers.5." not in n}
        for name, parameter in self.parts.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.optimiser = Optimiser(chosen, **rates)
        self._restore_precision()
        saved = self.folder / f"{self.stage}.pt"
        if saved.exists() and not args.fresh:
            state = torch.load(saved)
            self.optimiser.load(state["optimiser"])
            self.elapsed, self.step = state["elapsed"], state["step"]
        self.rng = np.random.default_rng([STAGES.index(self.stage), self.step])

    def _take(self, weights: dict[str, Tensor], source: str) -> None:
        prefixes = {
            "vision": ("model.model.vision_tower", "heads"),
            "language": ("model.model.language_model", "model.lm_head", "codebook", "probe"),
        }.get(source, ("",))
        mine = self.parts.state_dict()
        for name, value in weights.items():
            if name.startswith(prefixes) and name in mine:
                mine[name].copy_(value)
        self.float_weights = {n: v.float().clone() for n, v in mine.items()}

    def _restore_precision(self) -> None:
        """Masters start from float32 weights, not from their bfloat16 copies."""
        for name, value in getattr(self, "float_weights", {}).items():
            if name in self.optimiser.masters:
                self.optimiser.masters[name].copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """All parts, masters where there are some."""
        state = {name: value.float() for name, value in self.parts.state_dict().items()}
        state.update(getattr(self, "float_weights", {}))
        state.update(self.optimiser.masters)
        return state

    def loop(self) -> Iterator[float]:
        """Yields the share of the stage that is done; a pause of the process does not count."""
        budget = self.args.minutes * 60
        saved = time.monotonic()
        while self.elapsed < budget:
            start = time.monotonic()
            yield self.elapsed / budget
            self.optimiser.step(self._scale(self.elapsed / budget))
            self.step += 1
            self.elapsed += min(time.monotonic() - start, 5.0)
            if time.monotonic() - saved > 150:
                self.save()
                saved = time.monotonic()
        self.save()

    def _scale(self, done: float) -> float:
        warm = min(1.0, (self.step + 1) / 100)
        return warm * min(1.0, (1 - done) / self.args.decay + 0.02)

    def save(self) -> None:
        """Atomically."""
        target = self.folder / f"{self.stage}.pt"
        partial = target.with_suffix(".partial")
        state = {"weights": self.weights(), "optimiser": self.optimiser.state()}
        torch.save({**state, "elapsed": self.elapsed, "step": self.step}, partial)
        partial.replace(target)

    def log(self, **values: Any) -> None:
        """One JSON line, printed and kept."""
        line = {"stage": self.stage, "step": self.step, "seconds": round(self.elapsed)}
        line |= {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}
        print(json.dumps(line), flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


class Means:
    """Running means between two lines of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """NaN (nothing to score) is left out."""
        if value == value and weight:
            total = self.sums.setdefault(name, [0.0, 0.0])
            total[0] += value * weight
            total[1] += weight

    def add_kinds(self, right: Tensor, kinds: Tensor) -> None:
        """Accuracy per kind of question."""
        for number, kind in enumerate(scenes.KINDS):
            hits = right[kinds == number]
            self.add(kind, float(hits.float().mean()), len(hits))

    def take(self) -> dict[str, float]:
        """The means, which start anew."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


def _windows(run: Run, count: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Square windows of cached pictures around objects and texts: pixels, labels, geometry, places on the grid."""
    pixels, labels, geometry, index = [], [], [], []
    grid = np.arange(TOKENS).reshape(scenes.GRID, scenes.GRID)
    for seed in run.rng.integers(len(run.pictures), size=count).tolist():
        every, where = run.pictures.labels_of(seed)
        focus = np.flatnonzero(every[:, 0] == TEXT) if run.rng.random() < 0.4 else np.flatnonzero(every[:, 3] == 1)
        patch = int(run.rng.choice(focus)) if len(focus) else TOKENS // 2
        corner = np.array(divmod(patch, scenes.GRID)) - side // 2 + run.rng.integers(-2, 3, 2)
        row, column = np.clip(corner, 0, scenes.GRID - side)
        window = grid[row : row + side, column : column + side].reshape(-1)
        pixels.append(run.pictures.patches(seed)[window])
        labels.append(every[window])
        geometry.append(where[window])
        index.append(window)
    labels = torch.from_numpy(np.stack(labels)).long()
    return pixels_from_patches(np.stack(pixels)), labels, torch.from_numpy(np.stack(geometry)), _stack(index)


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def train_vision(run: Run) -> None:
    """The encoder alone, on windows of 8 x 8 patches: a ninth of the price of a picture, most objects left whole."""
    means = Means()
    for _ in run.loop():
        run.pictures.refresh()
        pixels, labels, geometry, index = _windows(run, run.args.batch, WINDOW)
        features = vision_features(run.model.model.vision_tower, pixels, index)
        loss, right = run.parts["heads"](features, labels, geometry, places(index))
        loss.backward()
        means.add("loss", loss.item())
        for name, value in right.items():
            means.add(name, value.item())
        if run.step % 50 == 49:
            run.log(**means.take())


def _symbols(run: Run, batch: list[scenes.Scene], keep: int, share: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of ``share`` patches of every object (its centre among them) and text, filled up to ``keep``."""
    labels, geometry, index = [], [], []
    for scene in batch:
        every, where = patch_labels(scene)
        owners = patch_owners(scene).reshape(-1)
        order = run.rng.permutation(TOKENS)
        order = order[np.argsort(every[order, 3] != 1, kind="stable")]
        ranks = np.zeros(TOKENS, np.int64)
        for owner in np.unique(owners[owners > 0]):
            mine = order[owners[order] == owner]
            ranks[mine] = np.arange(len(mine))
        last = (every[:, 0] == 0) + 2 * (ranks >= share)
        chosen = np.sort(order[np.argsort(last[order], kind="stable")][:keep])
        labels.append(every[chosen])
        geometry.append(where[chosen])
        index.append(chosen)
    stacked = [torch.from_numpy(np.stack(values)) for values in (labels, geometry, index)]
    return stacked[0], stacked[1], stacked[2]


def train_language(run: Run) -> None:
    """The language model alone, on symbols instead of pictures: what each patch shows, with noise."""
    means = Means()
    seeds = itertools.count(scenes.SPLITS["train"][0] + 1_000_000 + run.step * 8)
    for _ in run.loop():
        batch = [scenes.make_scene(next(seeds)) for _ in range(run.args.batch)]
        labels, geometry, index = _symbols(run, batch, 96)
        visual = run.parts["codebook"](labels, geometry + 0.006 * torch.randn_like(geometry), places(index))
        visual = (visual + 0.15 * torch.randn_like(visual)).bfloat16()
        _language_step(run, means, visual, index, batch, 10.0 if run.step < 300 else 4.0)
        if run.step % 100 == 99:
            run.log(**means.take())


def _language_step(
    run: Run,
    means: Means,
    visual: Tensor,
    index: Tensor | None,
    batch: list[scenes.Scene],
    probe: float,
    further: Tensor | float = 0.0,
) -> None:
    questions = question_batch(batch, run.rng, _KIND_WEIGHTS[run.stage])
    middle, final = language_states(run.model.model.language_model, visual, index, questions["tokens"])
    loss, right = answer_loss(run.model, final, questions)
    where, count = run.parts["probe"](middle, questions)
    (loss + probe * where + count + further).backward()
    means.add("count", count.item())
    means.add("loss", loss.item())
    means.add("where", where.item())
    means.add_kinds(right, questions["kind"])


# The slow kinds more often: colour, shape, existence, counting, relation, reading, place.
_KIND_WEIGHTS = {
    "language": np.array([0.10, 0.13, 0.14, 0.18, 0.20, 0.17, 0.08]),
    "joint": np.array([0.04, 0.17, 0.08, 0.38, 0.05, 0.24, 0.04]),
}


def train_align(run: Run) -> None:
    """Encoder and projector regressed onto the symbols that the language model has learned from.

    The projector alone for the first third: its first gradients would undo what the encoder has learned.
    """
    means = Means()
    spread = None
    again = any(source.startswith("align") for source in run.args.start)
    for done in run.loop():
        run.pictures.refresh()
        pixels, labels, geometry, index = _windows(run, run.args.batch, WINDOW)
        features = vision_features(run.model.model.vision_tower, pixels, index)
        heads, _ = run.parts["heads"](features, labels, geometry, places(index))
        with torch.no_grad():
            wanted = run.parts["codebook"](labels, geometry, places(index))
            if spread is None:
                spread = wanted.var()
            if run.step == 0 and not again:
                size = features.float().square().mean().sqrt()
                run.optimiser.rescale("model.model.multi_modal_projector.linear_1.weight", 1 / size.item())
                run.log(feature_size=size.item())
        seen = features[:, 1:]
        visual = project(
            run.model.model.multi_modal_projector, seen.detach() if done < 1 / 3 and not again else seen
        ).float()
        weight = 1 + 2.0 * (labels[..., :1] > 0)
        loss = (weight * (visual - wanted).square()).mean() / spread / weight.mean()
        (2 * loss + 0.5 * heads).backward()
        means.add("loss", loss.item())
        means.add("heads", heads.item())
        if run.step % 50 == 49:
            run.log(**means.take())
    run.log(**evaluate(run))


def train_joint(run: Run) -> None:
    """Everything, on whole pictures, from answers; the heads of the vision stage and the probe help a little.

    Every picture is new: the encoder has seen each text of the cache several times.
    """
    means = Means()
    evaluated = run.elapsed
    grid = places(torch.arange(TOKENS))
    for _ in run.loop():
        first = scenes.SPLITS["train"][0] + 3_000_000 + run.step * run.args.batch
        shown = [scenes.make_scene(seed) for seed in range(first, first + run.args.batch)]
        pixels = pixels_from_patches(np.stack([to_patches(np.asarray(scenes.render(scene))) for scene in shown]))
        features = vision_features(run.model.model.vision_tower, pixels)
        labels, geometry = zip(*[patch_labels(scene) for scene in shown], strict=True)
        heads, seen = run.parts["heads"](features, _stack(labels).long(), _stack(geometry), grid)
        means.add("heads", heads.item())
        means.add("centre_px", seen["centre_px"].item())
        means.add("middle", seen["middle"].item())
        visual = project(run.model.model.multi_modal_projector, features[:, 1:])
        _language_step(run, means, visual, None, shown, 1.0, 0.3 * heads)
        if run.step % 50 == 49:
            run.log(**means.take())
        if run.elapsed - evaluated > 240:
            run.log(**evaluate(run))
            evaluated = run.elapsed
    run.log(**evaluate(run))
    export(run)


@torch.no_grad()
def evaluate(run: Run, count: int = 96) -> dict[str, float]:
    """Exact match per kind on development scenes, through the fast forward pass, on all 576 tokens."""
    rng = np.random.default_rng(5)
    means = Means()
    first = scenes.SPLITS["dev"][0]
    for start in range(first, first + count, 8):
        batch = [scenes.make_scene(seed) for seed in range(start, start + 8)]
        pixels = pixels_from_patches(np.stack([to_patches(np.asarray(scenes.render(scene))) for scene in batch]))
        features = vision_features(run.model.model.vision_tower, pixels)
        visual = project(run.model.model.multi_modal_projector, features[:, 1:])
        questions = question_batch(batch, rng, None, 16)
        _, final = language_states(run.model.model.language_model, visual, None, questions["tokens"])
        _, right = answer_loss(run.model, final, questions)
        means.add_kinds(right, questions["kind"])
    kinds = means.take()
    return {f"dev_{kind}": value for kind, value in kinds.items()} | {"dev": sum(kinds.values()) / len(kinds)}


def export(run: Run) -> None:
    """The checkpoint as transformers reads it, and what is thrown away beside it, to go on from another day."""
    model, weights = make_model(), run.weights()
    prefix = "model."
    model.load_state_dict({n[len(prefix) :]: v for n, v in weights.items() if n.startswith(prefix)})
    save_checkpoint(model, run.folder / "checkpoint")
    others = {n: v.half().contiguous() for n, v in weights.items() if not n.startswith(prefix)}
    save_file(others, run.folder / _OTHERS)


def _weights_of(folder: Path, source: str) -> dict[str, Tensor]:
    """Weights of a stage in the work folder, or those of the finished run that lie beside this file."""
    if source != "repository":
        weights: dict[str, Tensor] = torch.load(folder / f"{source}.pt")["weights"]
        return weights
    here = Path(__file__).parent
    model = LlavaForConditionalGeneration.from_pretrained(here / "checkpoint", dtype=torch.float32)
    return {f"model.{name}": value for name, value in model.state_dict().items()} | load_file(here / _OTHERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for cache, states and log")
    parser.add_argument("--minutes", type=float, required=True, help="length of the stage, all its pieces together")
    parser.add_argument(
        "--start",
        nargs="*",
        default=[],
        help="stages whose weights to begin with, or repository: the checkpoint beside this file",
    )
    parser.add_argument("--fresh", action="store_true", help="do not resume this stage")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=6, help="pictures, windows or scenes in a step")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the stage in which the rate falls to zero")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model_code._vision_layer = torch.compile(model_code._vision_layer, dynamic=False)
    model_code._language_layer = torch.compile(model_code._language_layer, dynamic=False)
    trained = {
        "vision": ("model.model.vision_tower", "heads"),
        "language": ("model.model.language_model", "model.lm_head", "codebook", "probe"),
        "align": ("model.model.vision_tower", "model.model.multi_modal_projector", "heads"),
        "joint": ("model.", "probe", "heads"),
    }[args.stage]
    run = Run(args, {"muon_lr": args.muon_lr, "adam_lr": args.adam_lr}, trained)
    stages = {"vision": train_vision, "language": train_language, "align": train_align, "joint": train_joint}
    stages[args.stage](run)


if __name__ == "__main__":
    main()
