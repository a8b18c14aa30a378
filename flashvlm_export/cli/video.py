"""Options of the commands that ask about videos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashvlm_export.errors import UsageError

if TYPE_CHECKING:
    from flashvlm_export.runtime.video import Video

# Frames of a file where nothing is said.
_FRAMES = 16


def add_video_arguments(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--video``, which ``help`` tells of, how its frames are taken, and how they share the budget."""
    parser.add_argument("--video", metavar="FILE", action="append", default=[], help=help)
    parser.add_argument(
        "--frames", metavar="N", type=int, help=f"frames to take of a video, evenly spread (default: {_FRAMES})"
    )
    parser.add_argument(
        "--fps",
        metavar="R",
        type=float,
        help="frames to take per second instead; of a folder of pictures, the rate at which they were taken",
    )
    parser.add_argument(
        "--division",
        choices=("evenly", "relevance"),
        default="evenly",
        help="how the budget of a video is divided over its moments; half of it by their relevance needs --selector",
    )


def video_from(args: argparse.Namespace, path: str) -> Video:
    """Return the frames of ``path`` that the options ask for; raises as :func:`read_video` does."""
    from flashvlm_export.runtime.video import read_video

    frames = _FRAMES if args.frames is None and args.fps is None and not Path(path).is_dir() else args.frames
    return read_video(path, frames=frames, fps=args.fps)


def refuse_unused(args: argparse.Namespace) -> None:
    """Raise :class:`UsageError` where an option of videos is given without one."""
    given: list[str] = [f"--{name}" for name in ("frames", "fps") if getattr(args, name) is not None]
    given += ["--division"] if args.division != "evenly" else []
    if given and not args.video:
        raise UsageError("there is no video", received=", ".join(given), expected="--video too")


def describe(video: Video, kept: list[int]) -> dict[str, Any]:
    """Return what ``--json`` says of a video: its frames, their rate, and kept visual tokens of each moment."""
    return {"frames": len(video.frames), "fps": video.fps, "kept_per_moment": kept}
