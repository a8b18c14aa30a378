"""What helps training and is thrown away after it: heads on patches, symbols for pictures, a probe of the LLM."""

from __future__ import annotations

import scenes
import torch
import torch.nn.functional as F
from data import LABELS
from model import IDS, WIDTH, sines
from torch import Tensor, nn

PAIRS = len(scenes.COLOURS) * len(scenes.SHAPES)
_SIZES = {"kind": 3, "colour": 8, "shape": 6, "centre": 2, "word": 25, "tens": 9, "units": 10}
# What a head tells of a patch: besides, the glyph that covers most of it, a step on the way to words.
_HEADS = {**_SIZES, "glyph": len(scenes.GLYPHS)}
# Words are wrong longest, and few patches show them. Counting hangs on one clear middle of each object.
_WEIGHTS = {"kind": 1.0, "colour": 1.0, "shape": 1.0, "centre": 5.0, "word": 1.5, "tens": 1.0, "units": 1.0}
_WEIGHTS["glyph"] = 1.0
_GEOMETRY_WEIGHT = 60.0


class Heads(nn.Module):
    """Thrown away after training: what each patch shows, and from CLS which objects are in the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.patch = nn.Linear(WIDTH, sum(_HEADS.values()) + 3)
        self.cls = nn.Linear(WIDTH, PAIRS)

    def forward(self, features: Tensor, labels: Tensor, geometry: Tensor, places: Tensor) -> tuple[Tensor, dict]:
        """``places`` ``[B, K, 2]``: centres of the patches, over 336."""
        out = self.patch(self.norm(features[:, 1:])).float()
        logits = dict(zip(_HEADS, out[..., :-3].split(list(_HEADS.values()), -1), strict=True))
        loss, right = out.new_zeros(()), {}
        for column, name in enumerate(LABELS):
            wanted = labels[..., column]
            known = wanted >= 0
            loss = loss + _WEIGHTS[name] * F.cross_entropy(logits[name][known], wanted[known])
            right[name] = (logits[name][known].argmax(-1) == wanted[known]).float().mean()
        shown = labels[..., 0] > 0
        wanted = torch.cat([4 * (geometry[..., :2] - places), 8 * geometry[..., 2:]], -1)
        distance = (out[..., -3:] - wanted)[shown]
        loss = loss + _GEOMETRY_WEIGHT * distance.square().mean()
        middle = labels[..., 3] == 1
        right["middle"] = (logits["centre"][middle].argmax(-1) == 1).float().mean()
        right["centre_px"] = -distance[:, :2].abs().mean() * scenes.SIDE / 4
        objects = labels[..., 0] == 1
        pair = (labels[..., 1] * len(scenes.SHAPES) + labels[..., 2]).clamp(min=0)
        present = torch.zeros(len(labels), PAIRS).scatter_reduce(1, pair, objects.float(), "amax")
        inventory = self.cls(self.norm(features[:, 0])).float()
        return loss + 2 * F.binary_cross_entropy_with_logits(inventory, present), right


class Codebook(nn.Module):
    """Symbolic visual tokens for the language stage: a sum of learned vectors for what the patch shows.

    Thrown away after training. Colours, shapes, words and numbers start as the language model's own embeddings.
    """

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        rows = {name: torch.randn(size, WIDTH) * 0.3 for name, size in _SIZES.items()}
        rows["colour"] = words[[IDS[word] for word in scenes.COLOURS]].clone()
        rows["shape"] = words[[IDS[word] for word in scenes.SHAPES]].clone()
        rows["word"][:-1] = words[[IDS[word] for word in scenes.WORDS]]
        numbers = words[[IDS[word] for word in scenes.NUMBERS]].view(9, 10, WIDTH)
        rows["tens"], rows["units"] = numbers.mean(1) * 2, numbers.mean(0) * 2
        for table in rows.values():
            table[:, :3] = 0
        rows["centre"][1, 2] = 2.0
        rows["beside_colour"], rows["beside_shape"] = 0.7 * rows["colour"], 0.7 * rows["shape"]
        self.tables = nn.ParameterDict({name: nn.Parameter(table) for name, table in rows.items()})
        self.place = nn.Linear(34, WIDTH, bias=False)
        self.own = nn.Linear(35, WIDTH, bias=False)
        nn.init.normal_(self.place.weight, 0, 0.06)
        nn.init.normal_(self.own.weight, 0, 0.06)

    def forward(self, labels: Tensor, geometry: Tensor, places: Tensor) -> Tensor:
        """``[B, K, D]`` in float32."""
        total = self.place(torch.cat([sines(places[..., 0], places[..., 1], 8), places], -1))
        shown = (labels[..., :1] > 0).float()
        own = torch.cat([sines(geometry[..., 0], geometry[..., 1], 8), geometry], -1)
        total = total + shown * self.own(own)
        beside = labels[..., 0] == 2
        for column, name in enumerate(_SIZES):
            wanted = labels[..., column]
            if name in ("colour", "shape"):
                total = total + _look_up(self.tables[name], torch.where(beside, -1, wanted))
                total = total + _look_up(self.tables["beside_" + name], torch.where(beside, wanted, -1))
            else:
                total = total + _look_up(self.tables[name], wanted)
        return total


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of ``table``, zero where ``index`` is -1."""
    return F.embedding(index + 1, torch.cat([table.new_zeros(1, table.shape[1]), table]))


def places(index: Tensor) -> Tensor:
    """Centres of patches in 0..1, x first."""
    return torch.stack([index % scenes.GRID, index // scenes.GRID], -1).float().add(0.5) / scenes.GRID


class Probe(nn.Module):
    """Thrown away after training: where the object is that a question has just named, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(WIDTH, 2)
        self.count = nn.Linear(WIDTH, len(scenes.COUNTS))

    def forward(self, middle: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Squared error of the centre, over 336, and cross entropy of the number."""
        scene, question, step = batch["mentions"].T
        where = self.where(F.rms_norm(middle[scene, question, step], (WIDTH,))).float()
        scene, question, step = batch["totals"].T
        count = self.count(F.rms_norm(middle[scene, question, step], (WIDTH,))).float()
        return F.mse_loss(where, batch["where"]), F.cross_entropy(count, batch["numbers"])
