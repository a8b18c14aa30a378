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

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an importable module ``step`` that does what its first argument says."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "step.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "what, *rest = sys.argv[1:]\n"
        "print(f'{__name__} {what} {rest}')\n"
        "if what == 'bar': print('1 %\\r50 %\\r100 %\\r      \\r\\n\\nend')\n"
        "if what == 'read': print(repr(sys.stdin.read()))\n"
        "if what == 'raise': raise ValueError(os.environ.get('REASON'))\n"
        "if what == 'killed': sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "if what == 'wait': pathlib.Path(rest[0]).write_text(str(os.getpid())); time.sleep(120)\n"
    )
    return tmp_path


def test_runs_as_main_with_its_arguments(module: Path) -> None:
    done = run_child("step", "fine", module / "file")
    assert (done.returncode, done.lines) == (0, [f"__main__ fine ['{module / 'file'}']"])


def test_a_progress_bar_leaves_its_last_state(module: Path) -> None:
    assert run_child("step", "bar").lines[1:] == ["100 %", "end"]


def test_an_exception_is_the_last_line(module: Path) -> None:
    done = run_child("step", "raise", env={"REASON": "no such luck"})
    assert (done.returncode, done.last_line) == (1, "ValueError: no such luck")


def test_a_signal_is_named_whatever_was_printed(module: Path) -> None:
    done = run_child("step", "killed")
    assert (done.returncode, done.last_line) == (-signal.SIGKILL, "killed by SIGKILL")
    assert done.tail.endswith("__main__ killed []")


def test_standard_input_is_empty(module: Path) -> None:
    assert run_child("step", "read").last_line == "''"


def test_the_working_directory_is_not_on_the_import_path(module: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "signal.py").write_text("raise SystemExit('not the real one')")
    (elsewhere / "msgspec.py").write_text("raise SystemExit('not the real one')")
    assert run_child("step", "fine", cwd=elsewhere).returncode == 0
    done = run_child("flashvlm_export.specs", cwd=elsewhere)
    assert (done.returncode, done.lines) == (0, [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_its_parent(module: Path, number: signal.Signals) -> None:
    marker = module / "pid"
    code = (
        "import sys; from flashvlm_export import interrupts; from flashvlm_export.export.child import run_child; "
        "interrupts.install(); run_child('step', 'wait', sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{module}"}
    parent = subprocess.Popen([sys.executable, "-c", code, str(marker)], stderr=subprocess.DEVNULL, env=environment)
    try:
        child = int(_wait_for(lambda: marker.read_text() if marker.exists() else ""))
        parent.send_signal(number)
        parent.wait(60)
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
        # In a container whose first process reaps nobody, an ended process stays as a zombie.
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
