"""The ``flashvlm`` command: files here only parse; the work is a typed function elsewhere.

- ``models.py``   what can be exported
- ``export.py``   checkpoint → bundle
- ``calibrate.py`` photographs → INT8 graph
- ``targets.py``  what engines are built for
- ``build.py``    bundle → engine
- ``pack.py``     bundle → archive for a device
- ``export_triton.py`` bundle → model repository of Triton Inference Server
- ``run.py``      images and questions → answers
- ``chat.py``     one question after the other about the same images
- ``serve.py``    images and questions over HTTP → answers
- ``live.py``     a camera or a video and a standing question → an answer about each newest frame
- ``prompt.py``   images and a question → a file for any LLM engine
- ``report.py``   bundle against PyTorch → one page
- ``dataset.py``  published benchmark → data set
- ``eval.py``     data set → accuracy over budget
- ``inspect.py``  what a bundle holds, and whether it is whole
- ``backend.py``  options of the verbs that answer questions
- ``output.py``   one JSON object for machines, text for people
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from flashvlm_export import __version__, interrupts
from flashvlm_export.cli import (
    build,
    calibrate,
    chat,
    dataset,
    export,
    export_triton,
    inspect,
    live,
    models,
    pack,
    prompt,
    report,
    serve,
    targets,
)
from flashvlm_export.cli import eval as eval_
from flashvlm_export.cli import run as run_
from flashvlm_export.errors import FlashVLMError

_VERBS = (
    models,
    targets,
    export,
    calibrate,
    build,
    pack,
    export_triton,
    run_,
    chat,
    serve,
    live,
    prompt,
    report,
    dataset,
    eval_,
    inspect,
)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Compared as objects: a default of 0 is one that people want to see.
        if any(action.default is none for none in (None, False)) or action.default == [] or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="flashvlm",
        description="Vision-language models with text-guided visual token selection inside the exported graph.",
    )
    parser.add_argument("--version", action="version", version=f"flashvlm-export {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in _VERBS:
        summary = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        verb = verbs.add_parser(
            module.__name__.rpartition(".")[2].replace("_", "-"),
            help=summary,
            description=summary,
            formatter_class=_Formatter,
        )
        module.add_arguments(verb)
        verb.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output and nothing else"
        )
        verb.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (it failed), 2 (wrong usage), 130 (interrupted)."""
    parsed = build_parser().parse_args(arguments)
    return run_verb(f"flashvlm {parsed.verb}", parsed.run, parsed)


def run_verb(name: str, run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run one verb and return its exit code; errors raised on purpose become one message on standard error."""
    interrupts.install()
    try:
        run(args)
    except FlashVLMError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        interrupts.settle()
        print(f"{name}: interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell.
        sys.stderr.close()
        return 1
    return 0
