"""flashvlm live: a camera or a video with a standing question, answered about the newest frame."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashvlm_export import interrupts
from flashvlm_export.bundle import Bundle
from flashvlm_export.cli.backend import add_backend_arguments, add_llm_argument, pipeline_from, selector_from
from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.cli.run import add_sampling_arguments, budget_from, sampling_from
from flashvlm_export.cli.video import BUDGET_HELP, DIVISION_HELP, DIVISIONS
from flashvlm_export.errors import DependencyError, UsageError, install_hint

if TYPE_CHECKING:
    from PIL import Image

    from flashvlm_export.runtime.live.watch import Report, Seen, Statistics

# Answers that --json tells of: the newest ones of a run that may last for months. Each takes a few KiB.
_TOLD = 1_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm live``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        required=True,
        help="camera (0, /dev/videoN or below /dev/v4l), video file, picture, rtsp:// or http:// stream, csi or csi:N "
        "(a Jetson's camera connector), or gst:PIPELINE (any GStreamer source, without its sink)",
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the question that is asked of every frame")
    parser.add_argument("--system", metavar="TEXT", help="system text for the chat template")
    parser.add_argument("--budget", metavar="K", help=BUDGET_HELP)
    parser.add_argument(
        "--frames",
        metavar="N",
        type=int,
        help="ask about the newest N frames that were asked about, as a video, for models that take videos (default: "
        "about the newest frame as an image)",
    )
    parser.add_argument("--division", choices=DIVISIONS, default="evenly", help=DIVISION_HELP)
    parser.add_argument(
        "--every", metavar="S", type=float, default=0.0, help="least seconds from one question to the next"
    )
    parser.add_argument("--answers", metavar="N", type=int, help="end after N answers (default: no limit)")
    parser.add_argument("--seconds", metavar="S", type=float, help="end after S seconds (default: no limit)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="frames with kept tokens and answers: a recording (.mp4, .mkv), or the newest one (.png, .jpg, .webp)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that stands at --output")
    parser.add_argument(
        "--size", metavar="WxH", help="frame size to ask a camera for (default: its own; csi: 1280x720)"
    )
    parser.add_argument(
        "--fps",
        metavar="R",
        type=float,
        help="frames per second to ask a camera for (default: its own; csi: 30), or to show a picture at (default: 5)",
    )
    parser.add_argument("--loop", action="store_true", help="begin a video file again at its end")
    parser.add_argument("--port", metavar="N", type=int, help="show it in the browser at this port; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page; any but loopback is on the network")
    parser.add_argument(
        "--hosts",
        metavar="NAMES",
        help="names by which browsers may call the page, with commas (default: any, but only localhost's on loopback)",
    )
    parser.add_argument("--api-keys", metavar="FILE", type=Path, help="file with one key a line, which viewers need")
    add_backend_arguments(parser)
    add_llm_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Watch until a limit, the end of the source or Ctrl-C; print answers, and what was counted."""
    from flashvlm_export.runtime.live.drawing import draw_frame, with_words
    from flashvlm_export.runtime.live.outputs import output_to
    from flashvlm_export.runtime.live.sources import size_from, source_from
    from flashvlm_export.runtime.live.watch import Standing, check_standing, watch
    from flashvlm_export.runtime.request import Pruning

    size = None if args.size is None else size_from(args.size)
    source = source_from(args.source, size=size, fps=args.fps, loop=args.loop)
    output = None if args.output is None else output_to(args.output, overwrite=args.overwrite)
    bundle = Bundle.open(args.bundle)
    standing = Standing(
        args.prompt,
        args.system,
        Pruning(budget_from(args), args.text_span, args.positions, selector_from(args, bundle), args.division),
        sampling_from(args),
        frames=args.frames,
        every_s=args.every,
        answers=args.answers,
        seconds=args.seconds,
    )
    showing, put = _page(args)
    say = talk(args.json)
    told: deque[dict[str, Any]] = deque(maxlen=_TOLD)
    wrote: Path | None = None

    def on_seen(seen: Seen) -> None:
        nonlocal wrote
        say(f"{seen.captured_s:8.1f} s  {' '.join(seen.answer.text.split())}  ({seen.latency_ms:.0f} ms)")
        if args.json:
            told.append({**_answer(seen), "kept_indices": seen.kept.indices.astype(np.int32)})
        if output is not None or args.port is not None:
            frame = draw_frame(seen)
            picture = with_words(frame, seen, args.prompt)
            put(seen, frame, picture)
            if output is not None:
                output.add(picture, seen.captured_s + seen.latency_ms / 1e3)
                wrote = args.output
        interrupts.check()  # one that came where Python could not raise it

    with ExitStack() as stack:
        vlm = stack.enter_context(pipeline_from(args, bundle))
        check_standing(vlm, standing)
        if output is not None:
            stack.enter_context(output)
        address = stack.enter_context(showing)
        if address is not None:
            say(f"watch at {address}/live")
        say(f"{source.name}: {args.prompt}  (Ctrl-C ends)")
        report = watch(vlm, source, standing, on_seen=on_seen, on_event=lambda text: print(text, file=sys.stderr))
    interrupts.settle()
    for line in _summary(report.statistics):
        say(line)
    if wrote is not None:
        say(f"  written: {wrote}")
    if args.json:
        print_json(_told(args, source.name, report, list(told), wrote))
    if report.error is not None:
        raise report.error


def _page(
    args: argparse.Namespace,
) -> tuple[AbstractContextManager[str | None], Callable[[Seen, Image.Image, Image.Image], object]]:
    """Return what serves the live page and yields its address, and what puts an answered frame there."""
    if args.port is None:
        unused = [f"--{name.replace('_', '-')}" for name in ("hosts", "api_keys") if getattr(args, name) is not None]
        if unused:
            raise UsageError("there is no page", received=", ".join(unused), expected="--port too")
        return nullcontext(), lambda seen, frame, picture: None
    try:
        from flashvlm_export.runtime.server.live import Shown, showing
    except ImportError as error:
        raise DependencyError(
            "the page needs FastAPI, uvicorn and prometheus-client", received=str(error), hint=install_hint("serve")
        ) from error
    from flashvlm_export.runtime.live.drawing import jpeg_of
    from flashvlm_export.runtime.live.newest import Newest
    from flashvlm_export.runtime.server.settings import ServerSettings

    given = {name: getattr(args, name) for name in ("bundle", "host", "port", "hosts", "api_keys")}
    settings = ServerSettings.of({name: value for name, value in given.items() if value is not None})
    if not settings.on_loopback and settings.api_keys is None:
        talk(args.json)(f"anybody who reaches {settings.host} can watch: --api-keys FILE shuts others out")
    place: Newest[Shown] = Newest()

    def put(seen: Seen, frame: Image.Image, picture: Image.Image) -> None:
        told = {"prompt": args.prompt, **_answer(seen), **asdict(seen.statistics)}
        place.put(Shown(jpeg_of(frame), jpeg_of(picture), told))

    return showing(place, settings), put


def _answer(seen: Seen) -> dict[str, Any]:
    """Return what ``--json`` says of one answer."""
    prompt, stats = seen.answer.prompt, seen.answer.stats
    return {
        "answer": seen.answer.text,
        "frame": seen.frame,
        "captured_s": seen.captured_s,
        "latency_ms": seen.latency_ms,
        "visual_tokens": prompt.visual_tokens_before,
        "kept_tokens": prompt.visual_tokens_kept,
        "kept_indices": seen.kept.indices.tolist(),
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "finish_reason": stats.finish_reason,
        "stage_ms": seen.answer.stage_ms,
    }


def _told(
    args: argparse.Namespace, name: str, report: Report, answers: list[dict[str, Any]], wrote: Path | None
) -> dict[str, Any]:
    return {
        "bundle": str(args.bundle),
        "source": name,
        "prompt": args.prompt,
        "answers": answers,
        "ended": report.ended,
        "error": None if report.error is None else str(report.error),
        "output": None if wrote is None else str(wrote),
        **asdict(report.statistics),
    }


def _summary(totals: Statistics) -> list[str]:
    fps = "" if totals.source_fps is None else f", {totals.source_fps:.1f} per second"
    lines = [
        f"  {totals.seconds:.1f} s: {totals.received} frames received{fps}; {totals.answered} answered, "
        f"{totals.answers_per_second:.2f} per second; {totals.dropped} dropped; {totals.reconnects} reconnects"
    ]
    if totals.latency_p50_ms is not None:
        lines.append(
            f"  latency from capture to answer: median {totals.latency_p50_ms:.0f} ms, 99 % within "
            f"{totals.latency_p99_ms:.0f} ms"
        )
    return lines
