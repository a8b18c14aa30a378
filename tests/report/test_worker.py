"""Workers: what a function returns or raises in another process comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvlm_export.errors import ConfigError, WorkerError
from flashvlm_export.report.worker import Worker


def make_adder(offset: int) -> Callable[..., Any]:
    return lambda number=0: (os.getpid(), offset + number)


def make_sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def make_refusal(where: str) -> Callable[[], None]:
    def refuse() -> None:
        raise ConfigError("no such thing", received=lambda: "what no pickle takes", hint="do this")

    if where == "making":
        refuse()
    return refuse


def make_bug() -> Callable[[], float]:
    return lambda: 1 / 0


def make_suicide(where: str) -> Callable[[], None]:
    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "making":
        end()
    return end


def make_memory(size: int) -> Callable[[], int]:
    return lambda: len(bytearray(os.urandom(16)) * (size // 16))


def test_it_is_called_in_a_process_of_its_own() -> None:
    with Worker(make_adder, 40) as worker:
        process, value = worker(2)
        assert value == 42
        assert process != os.getpid()
        assert worker(3) == (process, 43)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("where", ["making", "calling"])
def test_a_refusal_comes_back_as_it_was_raised(where: str) -> None:
    with Worker(make_refusal, where) as worker:
        if where == "making":
            time.sleep(0.5)  # asked for when the process has long given up
        with pytest.raises(ConfigError, match="no such thing") as caught:
            worker()
    assert "function" in str(caught.value.received)
    assert caught.value.hint == "do this"


def test_waiting_tells_making_from_calling() -> None:
    with Worker(make_refusal, "calling") as worker:
        worker.wait()
        with pytest.raises(ConfigError):
            worker()
    with Worker(make_refusal, "making") as worker, pytest.raises(ConfigError):
        worker.wait()


def test_a_bug_comes_back_with_its_traceback() -> None:
    with Worker(make_bug) as worker, pytest.raises(WorkerError, match="ZeroDivisionError") as caught:
        worker()
    assert "lambda: 1 / 0" in str(caught.value.received)


@pytest.mark.parametrize("where", ["making", "calling"])
def test_a_process_that_dies_is_no_hang(where: str) -> None:
    with Worker(make_suicide, where) as worker, pytest.raises(WorkerError, match="process ended") as caught:
        worker()
    assert caught.value.received == "killed by SIGKILL"


def test_peak_memory_is_that_of_the_process_alone() -> None:
    ballast = bytearray(os.urandom(16)) * (400_000_000 // 16)  # of this process: no business of the worker's
    with Worker(make_memory, 100_000_000) as worker:
        worker.wait()
        before = worker.peak_memory_bytes
        assert worker() == 100_000_000
        grown = worker.peak_memory_bytes - before
    assert before < len(ballast)
    assert 90_000_000 < grown < 200_000_000


def test_an_interrupted_parent_takes_a_busy_worker_along_quietly(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "from flashvlm_export import interrupts\n"
        "from flashvlm_export.report.worker import Worker\n"
        "def make(): return lambda: (print('busy', flush=True), time.sleep(60))\n"
        "if __name__ == '__main__':\n"
        "    interrupts.install()\n"
        "    try:\n"
        "        with Worker(make) as worker: worker()\n"
        "    except KeyboardInterrupt: print('ended', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "busy\n"
        start = time.monotonic()
        running.terminate()  # the parent alone, as service managers do
        out, errors = running.communicate(timeout=60)
    assert (out, errors) == ("ended\n", "")
    assert time.monotonic() - start < 30  # and not the minute that the call would have taken
