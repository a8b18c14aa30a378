"""Outputs of an ONNX file in ONNX Runtime, computed in a process of its own.

An export holds the model in torch; what ONNX Runtime takes on top (a float16 graph becomes float32 on a CPU) goes back
to the system when the child ends.

arguments: FILE FEEDS.npz OUTPUTS.npz
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashvlm_export.errors import ExportError, SessionError
from flashvlm_export.export.child import run_child
from flashvlm_export.ort import ort_session
from flashvlm_export.specs import Array, Feeds


def ort_outputs(file: Path, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """Return the outputs of ``file`` for each of ``feeds``, by name.

    Raises:
        ExportError: if ONNX Runtime cannot load or run the file, with its message.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        given, wanted = Path(temporary, "feeds.npz"), Path(temporary, "outputs.npz")
        _save(given, feeds)
        done = run_child(__name__, file, given, wanted)
        if done.returncode:
            raise ExportError(
                "ONNX Runtime cannot run the exported graph",
                received=f"{file.name}: {done.last_line}",
                expected="a graph that it loads and runs on a CPU",
                hint="no bundle was written; check the versions against constraints.txt",
            )
        return _load(wanted)


def main(file: str, feeds: str, outputs: str) -> None:
    """Run ``file`` on every set of inputs in ``feeds`` and write all outputs."""
    try:
        session = ort_session(Path(file), providers=["CPUExecutionProvider"])
    except SessionError as error:
        raise SystemExit(str(error.received)) from error  # one line, for the parent's message
    names = [output.name for output in session.get_outputs()]
    _save(Path(outputs), [dict(zip(names, session.run(names, feed), strict=True)) for feed in _load(Path(feeds))])


def _save(path: Path, sets: Sequence[Feeds]) -> None:
    arrays = {f"{number}/{name}": array for number, one in enumerate(sets) for name, array in one.items()}
    np.savez(path, allow_pickle=False, **arrays)


def _load(path: Path) -> list[dict[str, Array]]:
    sets: dict[int, dict[str, Array]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            sets.setdefault(int(number), {})[name] = arrays[key]
    return [sets[number] for number in sorted(sets)]


if __name__ == "__main__":
    main(*sys.argv[1:])
