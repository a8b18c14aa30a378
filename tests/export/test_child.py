"""Steps in processes of their own: what they print, how they end, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flashvlm_export.export.child import run_child


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """The directory of an importable module ``step`` that does what its first argument says."""
    (tmp_path / "step.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "what, *rest = sys.argv[1:]\n"
        "print(f'{__name__} {what} {rest}')\n"
        "if what == 'bar': print('1 %\\r50 %\\r100 %\\n\\nend')\n"
        "if what == 'raise': raise ValueError(os.environ.get('REASON'))\n"
        "if what == 'killed': sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "if what == 'wait': pathlib.Path(rest[0]).write_text(str(os.getpid())); time.sleep(120)\n"
    )
    return tmp_path


def test_runs_as_main_with_its_arguments(module: Path) -> None:
    done = run_child("step", "fine", module / "file", cwd=module)
    assert (done.returncode, done.lines) == (0, [f"__main__ fine ['{module / 'file'}']"])


def test_a_progress_bar_leaves_its_last_state(module: Path) -> None:
    assert run_child("step", "bar", cwd=module).lines[1:] == ["100 %", "end"]


def test_an_exception_is_the_last_line(module: Path) -> None:
    done = run_child("step", "raise", cwd=module, env={"REASON": "no such luck"})
    assert (done.returncode, done.last_line) == (1, "ValueError: no such luck")


def test_a_signal_shows_in_the_exit_code(module: Path) -> None:
    done = run_child("step", "killed", cwd=module)
    assert (done.returncode, len(done.lines)) == (-signal.SIGKILL, 1)


def test_nothing_outlives_a_killed_parent(module: Path) -> None:
    marker = module / "pid"
    code = "import sys; from flashvlm_export.export.child import run_child; run_child('step', 'wait', sys.argv[1])"
    parent = subprocess.Popen([sys.executable, "-c", code, str(marker)], cwd=module)
    try:
        child = int(_wait_for(lambda: marker.read_text() if marker.exists() else ""))
    finally:
        parent.kill()
        parent.wait()
    assert _wait_for(lambda: "gone" if _is_gone(child) else "") == "gone"


def _wait_for(look: Callable[[], str]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("nothing happened within a minute")


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # In a container whose first process reaps nobody, an ended process stays as a zombie.
    return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
