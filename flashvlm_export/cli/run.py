"""flashvlm run: answer questions about images and videos with a bundle."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli.backend import add_backend_arguments, add_llm_argument, pipeline_from, selector_from
from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.cli.video import (
    BUDGET_HELP,
    add_video_arguments,
    describe,
    refuse_unused,
    video_from,
    video_options,
)
from flashvlm_export.errors import UsageError

if TYPE_CHECKING:
    from flashvlm_export.runtime.llm.base import SamplingParams
    from flashvlm_export.runtime.video import Video


T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm run``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        help="picture; repeat for several, asked as one batch",
    )
    add_video_arguments(
        parser, "video, or folder of pictures that are its frames; may be repeated, and is asked behind the images"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="question; one for all images and videos, or one for each",
    )
    parser.add_argument(
        "--pruned", metavar="FILE", type=Path, help="answer a prompt that flashvlm prompt wrote, instead of images"
    )
    add_prompt_arguments(parser)
    add_backend_arguments(parser)
    add_llm_argument(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--heatmap", metavar="FILE", type=Path, help="write a picture of scores and kept tokens (.png, .jpg, .webp)"
    )
    parser.add_argument("--visual-only", action="store_true", help="select tokens and stop; needs no language model")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how long an answer may be and how its tokens are chosen, from ``--max-tokens`` to ``--seed``."""
    parser.add_argument("--max-tokens", metavar="N", type=int, default=128, help="longest answer, in tokens")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="sample from the K likeliest tokens; 0 = all")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="sample from this much probability")
    parser.add_argument("--seed", metavar="SEED", type=int, help="of sampling; the same seed gives the same answer")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", help="end the answer before TEXT; repeat for several"
    )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what becomes of a question: ``--system``, ``--raw-prompt`` and ``--budget``."""
    parser.add_argument("--system", metavar="TEXT", help="system text for the chat template")
    parser.add_argument(
        "--raw-prompt",
        action="store_true",
        help="TEXT is a whole prompt with a placeholder for each image and video; no chat template",
    )
    parser.add_argument("--budget", metavar="K", help=BUDGET_HELP)


def run(args: argparse.Namespace) -> None:
    """Answer, stream the text, print times; write the heat map if asked."""
    from flashvlm_export.runtime.request import Pruning, Request

    params = sampling_from(args)
    if args.pruned is not None:
        _run_pruned(args, params)
        return
    refuse_unused(args)
    if not (args.image or args.video) or args.prompt is None:
        missing = ["--image or --video"] if not (args.image or args.video) else []
        missing += ["--prompt"] if args.prompt is None else []
        raise UsageError(
            "there is nothing to ask",
            received=f"no {' and '.join(missing)}",
            expected="--image or --video, and --prompt; or --pruned",
        )
    if args.visual_only and args.llm != "onnxruntime":
        raise UsageError("nothing answers", received=f"--llm {args.llm} --visual-only", expected="one of them")
    images: list[str] = args.image or []
    _pairs([*images, *args.video], args.prompt)  # refused before anything is read
    if args.heatmap is not None:
        from flashvlm_export.runtime.heatmap import check_picture_path

        check_picture_path(args.heatmap)
    bundle = Bundle.open(args.bundle)
    selector_from(args, bundle)
    pipeline = pipeline_from(args, bundle, with_llm=not args.visual_only)
    sources: list[tuple[str, str | Video]] = [(path, path) for path in images]
    sources += [(path, video_from(args, bundle, path)) for path in args.video]
    pairs = _pairs(sources, args.prompt)
    pruning = Pruning(budget_from(args), args.text_span, args.positions, division=args.division)
    say = talk(args.json)
    results: list[dict[str, Any]] = []
    with pipeline:
        asked = [Request([shown], text, args.system, args.raw_prompt) for (_, shown), text in pairs]
        prompts = pipeline.encode_each([(request, pruning) for request in asked])
        captions = []
        for ((path, shown), question), prompt in zip(pairs, prompts, strict=True):
            say(f"{path}: {question}")
            result: dict[str, Any] = {
                **({"image": path} if isinstance(shown, str) else describe(path, shown, prompt.images[0])),
                "prompt": question,
                "visual_tokens": prompt.visual_tokens_before,
                "kept_tokens": prompt.visual_tokens_kept,
                "kept_indices": prompt.indices[0],
                "stage_ms": prompt.stage_ms,
            }
            captions.append(question)
            if pipeline.llm is not None:
                answer = pipeline.answer(prompt, params, on_text=lambda piece: say(piece, end=""))
                say()
                result |= {
                    "answer": answer.text,
                    "prompt_tokens": answer.stats.prompt_tokens,
                    "new_tokens": answer.stats.new_tokens,
                    "finish_reason": answer.stats.finish_reason,
                    "stage_ms": answer.stage_ms,
                }
                captions[-1] += f"\n{result['answer'].strip()}"
            say(
                f"  kept {prompt.visual_tokens_kept} of {prompt.visual_tokens_before} visual tokens; "
                + ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in result["stage_ms"].items())
            )
            results.append(result)
    if args.heatmap is not None:
        from flashvlm_export.runtime.heatmap import draw_selection, save_picture, stack

        sheets = [
            draw_selection(pipeline.views(shown), kept.indices, kept.scores, kept.layout.grids, caption)
            for ((_, shown), _), prompt, caption in zip(pairs, prompts, captions, strict=True)
            for kept in prompt.images
        ]
        save_picture(stack(sheets), args.heatmap)
        say(f"  heat map: {args.heatmap}")
    if args.json:
        print_json(
            {"bundle": str(args.bundle), "answers": results, "heatmap": str(args.heatmap) if args.heatmap else None}
        )


def _run_pruned(args: argparse.Namespace, params: SamplingParams) -> None:
    """Answer a prompt from a file; the visual graph is not needed."""
    from flashvlm_export.runtime.llm.registry import require_same_model
    from flashvlm_export.runtime.prompt_file import read_prompt, require_same_weights

    visual = (
        "image",
        "video",
        "prompt",
        "system",
        "raw_prompt",
        "budget",
        "selector",
        "engine",
        "heatmap",
        "visual_only",
    )
    given = [f"--{name.replace('_', '-')}" for name in visual if getattr(args, name) not in (None, False, [])]
    given += video_options(args)
    given += ["--text-span"] if args.text_span != "prompt" else []
    given += ["--positions"] if args.positions is not None else []
    if given:
        raise UsageError(
            "a pruned prompt has its images and question inside, and its visual tokens are chosen",
            received=", ".join(given),
            expected="--pruned without them",
        )
    file = read_prompt(args.pruned)
    bundle = Bundle.open(args.bundle)
    require_same_weights(file.record, bundle)
    pipeline = pipeline_from(args, bundle)
    say = talk(args.json)
    ids, pieces = [], []
    assert pipeline.llm is not None  # a bundle without one is refused
    if file.has_gaps:
        pipeline.llm.require_gaps()
    with pipeline.llm as llm:
        require_same_model(llm, bundle.manifest, pipeline.embeddings)
        stop = file.record.stop_token_ids
        with closing(pipeline.generate(file.inputs_embeds, file.positions, params, stop_token_ids=stop)) as answer:
            for token, piece in answer:
                ids += [] if token is None else [token]
                pieces.append(piece)
                say(piece, end="")
        say()
    stats = llm.last_run
    assert stats is not None  # the stream was read to its end
    say(f"  {stats.prompt_tokens} positions; prefill {stats.prefill_ms:.0f} ms, decode {stats.decode_ms:.0f} ms")
    if args.json:
        print_json(
            {
                "pruned": str(args.pruned),
                "answer": "".join(pieces),
                "token_ids": ids,
                "prompt_tokens": stats.prompt_tokens,
                "new_tokens": stats.new_tokens,
                "finish_reason": stats.finish_reason,
                "stage_ms": {"prefill": stats.prefill_ms, "decode": stats.decode_ms},
            }
        )


def _pairs(images: list[T], prompts: list[str]) -> list[tuple[T, str]]:
    if len(images) == 1:
        images = images * len(prompts)
    if len(prompts) == 1:
        prompts = prompts * len(images)
    if len(images) != len(prompts):
        raise UsageError(
            "images and prompts do not pair up",
            received=f"{len(images)} --image or --video, {len(prompts)} --prompt",
            expected="one prompt for all images, one image for all prompts, or as many prompts as images",
        )
    return list(zip(images, prompts, strict=True))


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    """Return what the options of :func:`add_sampling_arguments` say."""
    from flashvlm_export.runtime.llm.base import SamplingParams

    return SamplingParams(
        max_new_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop or ()),
    )


def budget_from(args: argparse.Namespace) -> Any:
    """Return ``--budget`` as an ``int`` where it is one; what is not is refused by the budget's own check."""
    try:
        return None if args.budget is None else int(args.budget)
    except ValueError:
        return args.budget
