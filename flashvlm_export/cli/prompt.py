"""flashvlm prompt: write a pruned prompt as a file that any LLM engine can take."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli.backend import add_backend_arguments, pipeline_from, selector_from
from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.cli.run import add_prompt_arguments, budget_from
from flashvlm_export.cli.video import add_video_arguments, refuse_unused, video_from
from flashvlm_export.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm prompt``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="picture; repeat for several in one prompt"
    )
    add_video_arguments(parser, "video, or folder of pictures that are its frames; behind the images")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="question about them")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="safetensors file to write")
    add_prompt_arguments(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Select, splice, write; no language model is loaded."""
    from flashvlm_export.runtime.prompt_file import write_prompt
    from flashvlm_export.runtime.request import Pruning, Request

    refuse_unused(args)
    if not args.image and not args.video:
        raise UsageError("there is nothing to ask about", received="no --image, no --video", expected="one of them")
    if not args.output.absolute().parent.is_dir():
        raise UsageError(
            "the folder of the prompt file does not exist", received=str(args.output), hint="make the folder first"
        )
    bundle = Bundle.open(args.bundle)
    selector = selector_from(args, bundle)
    with pipeline_from(args, bundle, with_llm=False) as pipeline:
        shown = [*args.image, *(video_from(args, bundle, path) for path in args.video)]
        request = Request(shown, args.prompt, args.system, args.raw_prompt)
        pruning = Pruning(budget_from(args), args.text_span, args.positions, division=args.division)
        prompt = pipeline.encode_each([(request, pruning)])[0]
    record = write_prompt(args.output, prompt, bundle, text_span=args.text_span, selector=selector)
    if args.json:
        print_json({"prompt": str(args.output), "positions": len(prompt.inputs_embeds), "record": record})
        return
    say = talk(False)
    say(
        f"{args.output}: {len(prompt.inputs_embeds)} positions, {prompt.visual_tokens_kept} of "
        f"{prompt.visual_tokens_before} visual tokens"
    )
    if bundle.manifest.decoder is not None:
        say(f"next: flashvlm run {args.bundle} --pruned {args.output}")
