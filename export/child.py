"""A step in a process of its own: its memory goes back to the system when it ends, and it ends with its parent.

usage: python child.py ROOT MODULE [ARGUMENT...]

The child runs MODULE as ``python -m MODULE`` does, without the working directory on the import path, and leaves as
soon as its standard input closes. The parent holds the other end and never writes, so that also a parent that is killed
takes the child with it.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Where flashvlm_export lies: this file is flashvlm_export/export/child.py, in a checkout through a link.
_ROOT = str(Path(__file__).parents[2]) if __name__ != "__main__" else ""


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
        """The last thing it said, of an uncaught exception its type and message; or the signal that killed it."""
        if self.returncode < 0:
            return f"killed by {signal.Signals(-self.returncode).name}"
        return self.lines[-1] if self.lines else f"exit code {self.returncode}"

    @property
    def tail(self) -> str:
        """How it ended and what it said last, over several lines."""
        how = self.last_line if self.returncode < 0 else f"exit code {self.returncode}"
        return "\n    ".join([f"{how}; its last lines:", *self.lines[-8:]])


def run_child(
    module: str, *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> ChildResult:
    """Run ``module`` with ``arguments`` and wait for it.

    Args:
        module: what follows ``python -m``.
        arguments: its command line.
        cwd: its working directory; default: that of this process.
        env: variables on top of this process's.
    """
    # By path and not by name: the working directory of ``python -m`` may hold modules of any name.
    command = [sys.executable, __file__, _ROOT, module, *map(str, arguments)]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        with child:
            try:
                # Not communicate(), which would close its standard input.
                returncode = child.wait()
            except BaseException:
                child.kill()
                raise
        log.seek(0)
        text = log.read().decode("utf-8", errors="replace")
    shown = [[piece for piece in line.split("\r") if piece.strip()] for line in text.split("\n")]
    return ChildResult(returncode, [pieces[-1] for pieces in shown if pieces])


def main(root: str, module: str, *arguments: str) -> None:
    """Run ``module`` until it ends or the parent does; ``root`` is where this package lies."""
    # The parent's end of standard input is kept aside, so that a module that reads it finds it empty.
    parent = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()
    # In place of this file's directory; last, so that nothing there comes before the standard library.
    sys.path[:] = [*sys.path[1:], root]
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _leave_with_parent(parent: int) -> None:
    os.read(parent, 1)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
