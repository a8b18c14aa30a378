"""flashvlm chat: one question after the other about the same images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli.backend import add_backend_arguments, add_llm_argument, pipeline_from, selector_from
from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.cli.run import add_sampling_arguments, budget_from, sampling_from
from flashvlm_export.cli.video import BUDGET_HELP, add_video_arguments, refuse_unused, video_from
from flashvlm_export.errors import DependencyError, ImageError, LLMError, PromptError, UsageError, VideoError

if TYPE_CHECKING:
    from flashvlm_export.runtime.video import Video


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm chat``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="picture of the first question; may be repeated"
    )
    add_video_arguments(parser, "video of the first question, or folder of pictures that are its frames")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="question; repeat for the next ones. Without any, each line of standard input is one, and /image FILE or "
        "/video FILE adds a picture or a video to the next",
    )
    parser.add_argument(
        "--reselect",
        action="store_true",
        help="choose the visual tokens of every image anew for each question; otherwise they stay those that the "
        "question chose with which the image came, and what was computed of them is kept where the engine can",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text for the chat template")
    parser.add_argument("--budget", metavar="K", help=BUDGET_HELP)
    add_backend_arguments(parser)
    add_llm_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Ask, stream the answers, print times."""
    from flashvlm_export.runtime.chat import Chat
    from flashvlm_export.runtime.request import Pruning

    if args.prompt is not None:  # else /video FILE may come
        refuse_unused(args)
    bundle = Bundle.open(args.bundle)
    selector = selector_from(args, bundle)
    params = sampling_from(args)
    say = talk(args.json)
    results: list[dict[str, Any]] = []
    with pipeline_from(args, bundle) as vlm:
        pruning = Pruning(budget_from(args), args.text_span, args.positions, selector, args.division)
        chat = Chat(vlm, pruning, reselect=args.reselect, system=args.system)
        shown = [(path, _shown(args, bundle, "/image", path)) for path in args.image]
        shown += [(path, _shown(args, bundle, "/video", path)) for path in args.video]
        by_hand = args.prompt is None and sys.stdin.isatty()
        for text in args.prompt or _lines(by_hand):
            try:
                if args.prompt is None and text.startswith("/"):
                    command, path = _command(text)
                    shown.append((path, _shown(args, bundle, command, path)))
                    continue
                if not by_hand:
                    say(f"> {text}")
                images = [each for _, each in shown]
                answer = chat.ask(text, images, params=params, on_text=lambda piece: say(piece, end=""))
            except (DependencyError, ImageError, LLMError, PromptError, UsageError, VideoError) as error:
                if not by_hand:
                    if args.json and results:  # what was answered is not lost
                        print_json({"bundle": str(args.bundle), "answers": results})
                    raise
                # The conversation stands, without what came for this line: the next one may do better.
                print(error, file=sys.stderr)
                if shown and not text.startswith("/"):
                    paths = ", ".join(path for path, _ in shown)
                    print(f"without {paths}; /image FILE or /video FILE shows one again", file=sys.stderr)
                    shown = []
                continue
            stats = answer.stats
            say()
            say(
                f"  {stats.prompt_tokens} positions, {stats.reused_tokens} of them known; "
                + ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in answer.stage_ms.items())
            )
            results.append(
                {
                    "prompt": text,
                    "images": [path for path, each in shown if isinstance(each, str)],
                    "videos": [path for path, each in shown if not isinstance(each, str)],
                    "answer": answer.text,
                    "kept_indices": answer.prompt.indices,
                    "prompt_tokens": stats.prompt_tokens,
                    "reused_tokens": stats.reused_tokens,
                    "new_tokens": stats.new_tokens,
                    "finish_reason": stats.finish_reason,
                    "stage_ms": answer.stage_ms,
                }
            )
            shown = []
    if args.json:
        print_json({"bundle": str(args.bundle), "answers": results})


def _lines(by_hand: bool) -> Iterator[str]:
    """Yield what is typed or piped in, without empty lines; a person is told what to type, and asked for each."""
    if by_hand:
        print("a question, /image FILE or /video FILE to show one, or Ctrl-D to end", file=sys.stderr)
    while True:
        if by_hand:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _command(line: str) -> tuple[str, str]:
    """Return the command and FILE of ``/image FILE``; raise :class:`UsageError` for anything else with a slash."""
    word, _, path = line.partition(" ")
    if word not in ("/image", "/video") or not path.strip():
        expected = "/image FILE, /video FILE, or a question"
        what = "the command lacks a file" if word in ("/image", "/video") else "there is no such command"
        raise UsageError(what, received=repr(line), expected=expected)
    return word, path.strip()


def _shown(args: argparse.Namespace, bundle: Bundle, command: str, path: str) -> str | Video:
    """Return ``path`` if there is a picture, or the frames of a video; raise what reading them raises."""
    from flashvlm_export.runtime.images import load_image

    if command == "/video":
        return video_from(args, bundle, path)
    load_image(path)
    return path
