"""Training data of flashvlm-tiny: rendered scenes cached on disk, labels of every patch, batches of questions."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import scenes
import torch
from model import ANSWER_STEPS, IDS, encode
from scenes import GRID, KINDS, PATCH, TEXT_OWNER, Scene

CHUNK = 2000
PIXELS = 3 * PATCH * PATCH
# Columns of patch_labels; -1 where a label does not apply.
LABELS = ["kind", "colour", "shape", "centre", "word", "tens", "units", "glyph"]
BACKGROUND, OBJECT, TEXT = 0, 1, 2
QUESTIONS = 12


def to_patches(picture: np.ndarray) -> np.ndarray:
    """``[336, 336, 3]`` to ``[576, 588]``: rows of patches, each channel-major as the convolution's weights are."""
    tiles = picture.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(GRID * GRID, PIXELS)


def write_chunk(folder: Path, number: int) -> None:
    """Render training scenes ``number * 2000`` and following into ``chunk-NN.npy``, 0.7 GB."""
    target = folder / f"chunk-{number:02d}.npy"
    if target.exists():
        return
    partial = target.with_suffix(".partial")
    chunk = np.lib.format.open_memmap(partial, "w+", np.uint8, (CHUNK, GRID * GRID, PIXELS))
    for index in range(CHUNK):
        chunk[index] = to_patches(np.asarray(scenes.render(scenes.make_scene(number * CHUNK + index))))
    chunk.flush()
    partial.replace(target)


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """``[576, 8]`` int64 labels as in ``LABELS``, and ``[576, 3]`` float32: centre and radius of the object, over 336.

    A patch of text carries the colour, shape and place of the object that it stands beside.
    """
    labels = np.full((GRID * GRID, len(LABELS)), -1, np.int64)
    labels[:, 0] = BACKGROUND
    geometry = np.zeros((GRID * GRID, 3), np.float32)
    owners = scenes.patch_owners(scene).reshape(-1)
    for index, thing in enumerate(scene.things):
        own, beside = owners == 1 + index, owners == TEXT_OWNER + index
        either = own | beside
        labels[own, 0], labels[beside, 0] = OBJECT, TEXT
        labels[either, 1], labels[either, 2] = thing.colour, thing.shape
        labels[own, 3] = 0
        labels[thing.y // PATCH * GRID + thing.x // PATCH, 3] = 1
        geometry[either] = np.array([thing.x, thing.y, thing.radius], np.float32) / scenes.SIDE
        if thing.text is not None:
            value = thing.text.value
            labels[beside, 7] = np.tile(scenes.glyph_columns(thing.text), GRID)[beside]
            if value.isdigit():
                labels[beside, 4] = len(scenes.WORDS)
                labels[beside, 5], labels[beside, 6] = int(value[0]) - 1, int(value[1])
            else:
                labels[beside, 4] = scenes.WORDS.index(value)
    return labels, geometry


class Pictures:
    """The chunks on disk so far; ``refresh`` looks for new ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunks: list[np.ndarray] = []
        self.labels: list[tuple[np.ndarray, np.ndarray] | None] = []

    def refresh(self) -> None:
        """Open chunks written since the last call."""
        while (path := self.folder / f"chunk-{len(self.chunks):02d}.npy").exists():
            self.chunks.append(np.load(path, mmap_mode="r"))
            self.labels += [None] * CHUNK

    def __len__(self) -> int:
        return len(self.chunks) * CHUNK

    def patches(self, seed: int) -> np.ndarray:
        """``[576, 588]`` uint8."""
        return self.chunks[seed // CHUNK][seed % CHUNK]

    def labels_of(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """``patch_labels``, kept in memory in small types."""
        kept = self.labels[seed]
        if kept is None:
            labels, geometry = patch_labels(scenes.make_scene(seed))
            kept = labels.astype(np.int8), geometry
            self.labels[seed] = kept
        return kept


def question_batch(
    batch: list[Scene], rng: np.random.Generator, weights: np.ndarray | None = None, count: int = QUESTIONS
) -> dict[str, torch.Tensor]:
    """Tokens of ``count`` questions about each scene, answers included, right-padded.

    ``tokens`` ``[B, Q, T]``; ``last`` ``[B, Q]``, the position that predicts the answer; ``answer`` ``[B, Q]``;
    ``kind`` ``[B, Q]``; ``mentions`` ``[M, 3]`` (scene, question, position of the name's last token) with ``where``
    ``[M, 2]``, the centre of the object named, over 336; ``totals`` and ``numbers`` likewise for counting, from 0.
    """
    tokens = np.full((len(batch), count, ANSWER_STEPS), IDS["<pad>"], np.int64)
    last = np.zeros((len(batch), count), np.int64)
    answer = np.zeros_like(last)
    kinds = np.zeros_like(last)
    mentions, where, totals, numbers = [], [], [], []
    for row, scene in enumerate(batch):
        filled = 0
        while filled < count:
            kind = int(rng.choice(len(KINDS), p=weights))
            question = scenes.draw_question(scene, KINDS[kind], rng)
            if question is None:
                continue
            ids = [*encode(question.text), IDS["assistant"], IDS[":"], IDS[question.answer]]
            tokens[row, filled, : len(ids)] = ids
            last[row, filled], answer[row, filled], kinds[row, filled] = len(ids) - 2, ids[-1], kind
            for words, thing in question.mentions:
                mentions.append((row, filled, words - 1))
                where.append((scene.things[thing].x / scenes.SIDE, scene.things[thing].y / scenes.SIDE))
            if question.total is not None:
                totals.append((row, filled, question.total[0] - 1))
                numbers.append(question.total[1] - 1)
            filled += 1
    return {
        "tokens": torch.from_numpy(tokens),
        "last": torch.from_numpy(last),
        "answer": torch.from_numpy(answer),
        "kind": torch.from_numpy(kinds),
        "mentions": torch.tensor(mentions, dtype=torch.int64).reshape(-1, 3),
        "totals": torch.tensor(totals, dtype=torch.int64).reshape(-1, 3),
        "numbers": torch.tensor(numbers, dtype=torch.int64),
        "where": torch.tensor(where, dtype=torch.float32).reshape(-1, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the cache, outside the repository")
    parser.add_argument("--chunks", type=int, default=12, help="2000 scenes and 0.7 GB each")
    args = parser.parse_args()
    cache = args.work / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for number in range(args.chunks):
        write_chunk(cache, number)
        print("chunk", number, flush=True)


if __name__ == "__main__":
    main()
