"""Held-out questions of flashvlm-tiny as ``flashvlm eval`` reads them: ``SPLIT.jsonl`` and a folder of pictures.

``SPLIT.txt`` has the questions alone, a line for each picture in the order of their names, as ``flashvlm report`` and
``flashvlm calibrate`` take them. ``SPLIT.jsonl`` comes last: where it stands, all is there, and nothing is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import scenes


def write_dataset(folder: Path, split: str, count: int) -> Path:
    """Write ``count`` questions of ``split`` (see :func:`scenes.held_out`) and return the file of questions."""
    target = folder / f"{split}.jsonl"
    if target.exists():
        standing = len(target.read_text(encoding="utf-8").splitlines())
        if standing != count:
            raise SystemExit(f"{target} holds {standing} questions, not {count}; --overwrite writes it anew")
        return target
    images = folder / split
    if images.exists():  # pictures of a run that was interrupted
        shutil.rmtree(images)
    images.mkdir(parents=True)
    lines = []
    for number, (seed, question) in enumerate(scenes.held_out(split, count)):
        # Little compression: the noise in the pictures leaves nothing to gain.
        scenes.render(scenes.make_scene(seed)).save(images / f"{seed}.png", compress_level=1)
        line = {
            "id": f"{question.kind}-{number}",
            "image": f"{split}/{seed}.png",
            "question": question.text,
            "answers": [question.answer],
            "kind": question.kind,
            "metric": "exact",
        }
        lines.append(json.dumps(line))
    questions = "".join(f"{json.loads(line)['question']}\n" for line in lines)
    target.with_suffix(".txt").write_text(questions, encoding="utf-8")
    partial = target.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--count", type=int, default=3000, help="3,000 questions take 0.3 GB")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    if args.overwrite:
        (args.folder / f"{args.split}.jsonl").unlink(missing_ok=True)
    print(write_dataset(args.folder, args.split, args.count))


if __name__ == "__main__":
    main()
