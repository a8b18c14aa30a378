"""flashvlm serve: answer over HTTP as OpenAI's API does, with a page in the browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.errors import DependencyError, install_hint

if TYPE_CHECKING:
    from flashvlm_export.runtime.server.conversation import Model
    from flashvlm_export.runtime.service import Service


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm serve``: one for each setting."""
    from flashvlm_export.runtime.server.settings import ServerSettings

    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="directory written by flashvlm export")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="TOML file with any of these options, as max_queue = 64; options that are typed win over it",
    )
    for name, kind, choices, default, description in ServerSettings.options():
        shown = "" if default in (None, False, ()) else f" (default: {default})"
        more: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": str if kind is tuple else kind}
        if choices:
            more["choices"] = choices
        elif kind is not bool:
            more["metavar"] = {int: "N", float: "X", tuple: "NAMES", str: "TEXT"}[kind]
        # Only what is typed takes the place of what the file says.
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=description + shown, **more)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    from flashvlm_export.runtime.server.settings import ServerSettings

    names = ["bundle", *(option.name for option in ServerSettings.options())]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    settings = ServerSettings.of(given, args.config)
    try:
        from flashvlm_export.runtime.server.listening import serve
    except ImportError as error:
        raise DependencyError(
            "the server needs FastAPI, uvicorn and prometheus-client", received=str(error), hint=install_hint("serve")
        ) from error
    say = talk(args.json)
    result: dict[str, Any] = {"verb": "serve", "bundle": str(settings.bundle)}

    def ready(address: str, service: Service, model: Model) -> None:
        selectors = ", ".join(model.selectors) or "the graph's own"
        result.update(model=model.name, address=address, selectors=list(model.selectors))
        say(f"  model: {model.name}, {model.visual_tokens} visual tokens, {model.default_budget} kept by default")
        say(f"  selectors: {selectors}; language model: {settings.llm}")
        say(f"  at once: {service.max_answers} answers; {service.max_queue} requests wait")
        for option in ServerSettings.options():
            value = getattr(settings, option.name)
            if value != option.default:
                say(f"  {option.name}: {value}")
        if not settings.on_loopback and settings.api_keys is None:
            say(
                f"  anybody who reaches {settings.host} may ask: --api-keys FILE, or --host 127.0.0.1, shuts others out"
            )
        say(f"listening at {address}, Ctrl-C ends")

    serve(settings, on_ready=ready)
    say("finished what was running; no longer listening")
    if args.json:
        print_json(result)
