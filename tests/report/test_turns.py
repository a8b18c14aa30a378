"""Workers: what a function returns or raises in another process comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from flashvlm_export.errors import ConfigError
from flashvlm_export.report.turns import Worker, take_turns


def make_adder(offset: int) -> Callable[..., Any]:
    return lambda number=0: (os.getpid(), offset + number)


def make_sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def make_refusal(where: str) -> Callable[[], None]:
    def refuse() -> None:
        raise ConfigError("no such thing", received=1, hint="do this")

    if where == "making":
        refuse()
    return refuse


def make_bug() -> Callable[[], float]:
    return lambda: 1 / 0


def make_suicide() -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


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
    with Worker(make_refusal, where) as worker, pytest.raises(ConfigError, match="no such thing") as caught:
        worker()
    assert (caught.value.received, caught.value.hint) == (1, "do this")


def test_a_bug_comes_back_with_its_traceback() -> None:
    with Worker(make_bug) as worker, pytest.raises(RuntimeError, match="ZeroDivisionError"):
        worker()


def test_a_process_that_dies_is_no_hang() -> None:
    with Worker(make_suicide) as worker, pytest.raises(RuntimeError, match="exit code -9"):
        worker()


def test_turns_give_every_worker_its_own_times() -> None:
    with Worker(make_sleeper, 0.02) as short, Worker(make_sleeper, 0.4) as long:
        times_ms = take_turns({"short": short, "long": long}, repeats=2)
    assert [len(values) for values in times_ms.values()] == [2, 2]
    # Sleeping takes at least as long as asked, however busy the machine is.
    assert min(times_ms["short"]) >= 20
    assert min(times_ms["long"]) >= 400
