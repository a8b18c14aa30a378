"""Options of the commands that ask about videos."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from flashvlm_export.errors import UsageError

if TYPE_CHECKING:
    from flashvlm_export.bundle import Bundle
    from flashvlm_export.runtime.request import SelectedImage
    from flashvlm_export.runtime.video import Video

BUDGET_HELP = (
    "visual tokens to keep per image (default: what the graph is optimised for), or of a whole video (default: 22 %% "
    "of its own); full keeps all"
)
DIVISIONS = ("evenly", "relevance")
DIVISION_HELP = "how the budget of a video is divided over its moments; half of it by their relevance needs --selector"


def add_video_arguments(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--video``, which ``help`` tells of, how its frames are taken, and how they share the budget."""
    parser.add_argument("--video", metavar="FILE", action="append", default=[], help=help)
    parser.add_argument(
        "--frames",
        metavar="N",
        type=int,
        help="frames to take of a video, evenly spread (default: 16, or all if there are fewer; all of a folder)",
    )
    parser.add_argument(
        "--fps",
        metavar="R",
        type=float,
        help="frames to take per second instead; of a folder of pictures, the rate at which they were taken",
    )
    parser.add_argument("--division", choices=DIVISIONS, default="evenly", help=DIVISION_HELP)


def video_from(args: argparse.Namespace, bundle: Bundle, path: str) -> Video:
    """Return the frames of ``path`` that the options ask for, unless the model takes none.

    Raises:
        UsageError: if it takes none, and what :func:`read_video` raises.
    """
    from flashvlm_export.runtime.video_file import read_video

    if bundle.manifest.video is None:
        raise UsageError(
            "this model takes no videos",
            received=f"{path}, {bundle.manifest.source.family}",
            expected="one that does: flashvlm models",
            hint="ask about some of its frames as images",
        )
    return read_video(path, frames=args.frames, fps=args.fps)


def video_options(args: argparse.Namespace) -> list[str]:
    """Return those that are given beside ``--video``."""
    given = [f"--{name}" for name in ("frames", "fps") if getattr(args, name) is not None]
    return given + (["--division"] if args.division != "evenly" else [])


def refuse_unused(args: argparse.Namespace) -> None:
    """Raise :class:`UsageError` where an option of videos is given without one."""
    given = video_options(args)
    if given and not args.video:
        raise UsageError("there is no video", received=", ".join(given), expected="--video too")


def describe(path: str, video: Video, kept: SelectedImage) -> dict[str, Any]:
    """Return what ``--json`` says of a video: its frames, their rate, and kept visual tokens of each moment."""
    return {"video": path, "frames": len(video.frames), "fps": video.fps, "kept_per_moment": kept.kept_per_grid}
