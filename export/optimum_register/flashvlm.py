"""``optimum-cli export flashvlm``: the same arguments and work as ``flashvlm export``.

optimum imports every file of the namespace package ``optimum.commands.register``; the wheel puts this one there.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from flashvlm_export.cli import run_verb
from flashvlm_export.cli.export import add_arguments, run


class FlashVLMExportCommand(BaseOptimumCLICommand):
    """Adds the verb to ``optimum-cli export``."""

    COMMAND = CommandInfo(
        name="flashvlm", help="Vision-language model to ONNX with visual token selection inside the graph."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments of ``flashvlm export``."""
        add_arguments(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    def run(self) -> None:
        """Export; a user's mistake ends with one message and its exit code."""
        code = run_verb("optimum-cli export flashvlm", run, self.args)
        if code:
            raise SystemExit(code)


REGISTER_COMMANDS = [(FlashVLMExportCommand, ExportCommand)]
