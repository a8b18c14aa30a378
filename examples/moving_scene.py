"""A clip of a scene of flashvlm-tiny's kind in which one object moves, to try ``flashvlm live`` without a camera.

usage: python examples/moving_scene.py clip.mp4 [--seconds 12]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/tiny"))

import scenes

#: What to ask of each frame; :func:`answer_at` says what is true.
QUESTION = "Is the red circle on the left or on the right?"
FPS = 15
# Left, right and left again take so long.
_ROUND_S = 6.0
_SEED = 11_000_003


def place_at(seconds: float) -> int:
    """Return the x of the moving circle's centre in pixels, of 336."""
    way = (seconds % _ROUND_S) / _ROUND_S * 2
    return round(50 + 236 * (way if way < 1 else 2 - way))


def answer_at(seconds: float) -> str:
    """Return the right answer to the question at a time; near the middle it is nobody's to say."""
    return "left" if place_at(seconds) < scenes.SIDE // 2 else "right"


def picture_at(seconds: float) -> Image.Image:
    """Return the frame that is shown at a time: 336 x 336 pixels."""
    circle = scenes.Thing(scenes.SHAPES.index("circle"), scenes.COLOURS.index("red"), place_at(seconds), 168, 34)
    others = [
        scenes.Thing(scenes.SHAPES.index("star"), scenes.COLOURS.index("yellow"), 168, 60, 28),
        scenes.Thing(scenes.SHAPES.index("square"), scenes.COLOURS.index("blue"), 90, 276, 26),
        scenes.Thing(scenes.SHAPES.index("triangle"), scenes.COLOURS.index("green"), 250, 280, 30),
    ]
    return scenes.render(replace(scenes.make_scene(_SEED), things=[circle, *others]))


def write_clip(path: Path, seconds: float) -> None:
    """Write the frames of so many seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"qscale": "3"})
        stream.width = stream.height = scenes.SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(round(seconds * FPS)):
            shot = av.VideoFrame.from_image(picture_at(number / FPS))
            shot.pts, shot.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(shot))
        container.mux(stream.encode(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--seconds", type=float, default=12.0)
    args = parser.parse_args()
    write_clip(args.clip, args.seconds)
    print(f"{args.clip}: {args.seconds:g} s; ask of it: {QUESTION}")


if __name__ == "__main__":
    main()
