"""Compiling an exported graph with TensorRT-RTX, the strictest reader that it meets before a device does.

No GPU is needed. The check runs in a process of its own, because the compiler holds several copies of the weights.

arguments: FILE SPEC.json REPORT.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import msgspec

from flashvlm_export.errors import ExportError
from flashvlm_export.export.child import run_child
from flashvlm_export.export.engine_from_onnx import engine_from_onnx
from flashvlm_export.specs import GraphSpec

_CAPABILITY = (8, 6)


def check_engine_builds(file: Path, spec: GraphSpec) -> dict[str, float]:
    """Compile ``file`` for one GPU and return seconds and engine size; the engine is dropped.

    Raises:
        ExportError: with what the parser or the compiler said, or the signal that ended it.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        given, report = Path(temporary, "spec.json"), Path(temporary, "report.json")
        given.write_bytes(msgspec.json.encode(spec))
        done = run_child(__name__, file, given, report)
        if done.returncode:
            raise ExportError(
                f"the exported graph does not compile with TensorRT-RTX: {file.name}",
                received=done.tail,
                hint="no bundle was written; free some memory, or leave the check out: --engine-check off"
                if done.returncode < 0
                else "no bundle was written; report this with the versions in use, or leave it out: --engine-check off",
            )
        return msgspec.json.decode(report.read_bytes(), type=dict[str, float])


def main(file: str, spec: str, report: str) -> None:
    """Compile ``file`` for ``spec`` and write the report."""
    graph_spec = msgspec.json.decode(Path(spec).read_bytes(), type=GraphSpec)
    start = time.perf_counter()
    with Path(report).with_suffix(".engine").open("wb") as engine:
        engine_from_onnx(
            Path(file), graph_spec, "tensorrt-rtx", engine, profiles=[graph_spec.dims], capabilities=[_CAPABILITY]
        )
        measured = {"compile_s": round(time.perf_counter() - start, 1), "engine_size_bytes": engine.tell()}
    Path(report).write_bytes(msgspec.json.encode(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
