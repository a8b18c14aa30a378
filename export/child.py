"""A step in a process of its own: its memory goes back to the system when it ends, and it ends with its parent.

usage: python -m flashvlm_export.export.child MODULE [ARGUMENT...]

The child runs MODULE as ``python -m MODULE`` does, and leaves as soon as its standard input closes. The parent holds
the other end and never writes, so that also a parent that is killed takes the child with it.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import flashvlm_export

_PACKAGE_ROOT = Path(flashvlm_export.__file__).parents[1]


@dataclass(frozen=True)
class ChildResult:
    """How a child ended.

    Attributes:
        returncode: its exit code; negative for the signal that killed it.
        lines: what it printed on either stream, without empty lines and without what a progress bar overwrote.
    """

    returncode: int
    lines: list[str]

    @property
    def last_line(self) -> str:
        """The last thing it said: of an uncaught exception, its type and message."""
        return self.lines[-1] if self.lines else f"exit code {self.returncode}"


def run_child(
    module: str, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> ChildResult:
    """Run ``module`` with ``arguments`` and wait for it.

    Args:
        module: what follows ``python -m``.
        arguments: its command line.
        cwd: its working directory, which is also on its import path; default: that of this process.
        env: variables on top of this process's.
    """
    command = [sys.executable, "-m", __name__, module, *map(str, arguments)]
    path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            returncode = child.wait()
        finally:
            child.kill()  # does nothing to one that has ended
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
        log.seek(0)
        text = log.read().decode("utf-8", errors="replace")
    return ChildResult(returncode, [line.rpartition("\r")[2] for line in text.split("\n") if line.strip()])


def main(module: str, *arguments: str) -> None:
    """Run ``module`` until it ends or the parent does."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _leave_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
