"""Interruptions where Python cannot raise them."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from flashvlm_export import interrupts
interrupts.install()
class Dying:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        raise self.error
Dying({error}("in a destructor"))
print("went on")
"""


def run(error: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{error}", error)], capture_output=True, text=True, check=True
    )


def test_an_interruption_in_a_destructor_prints_nothing_and_other_errors_still_do() -> None:
    silent, said = run("KeyboardInterrupt"), run("ValueError")
    assert (silent.stdout, silent.stderr) == ("went on\n", "")
    assert said.stdout == "went on\n"
    assert "ValueError: in a destructor" in said.stderr
