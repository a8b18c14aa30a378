"""Compiling a graph with TensorRT-RTX, which needs no GPU: the strictest reader a graph meets before a device does.

The check runs in a process of its own, because the compiler holds several copies of the weights.

arguments: FILE SPEC.json REPORT.json
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from flashvlm_export.errors import DependencyError, ExportError
from flashvlm_export.export.child import run_child
from flashvlm_export.specs import GraphSpec


def rtx_available() -> bool:
    """Return whether the ``tensorrt_rtx`` package is installed."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def rtx_engine_from_onnx(file: Path, spec: GraphSpec, *, compute_capability: tuple[int, int] = (8, 6)) -> bytes:
    """Return the serialised TensorRT-RTX engine of ``file``, strongly typed, with one profile over ``spec.dims``.

    Raises:
        DependencyError: if TensorRT-RTX is not installed.
        ExportError: if the parser or the compiler rejects the graph, with their messages.
    """
    if not rtx_available():
        raise DependencyError(
            "TensorRT-RTX is not installed",
            expected="the package tensorrt-rtx-cu12",
            hint="pip install 'flashvlm-export[rtx]'",
        )
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):
        messages = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ExportError(f"TensorRT-RTX cannot parse {file.name}", received="; ".join(messages))
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if tensor.name == "budget":
            budget = spec.dim("budget")
            profile.set_shape_input(tensor.name, [budget.min], [budget.opt], [budget.max])
        else:
            sizes = [
                [getattr(spec.dim(size), bound) if isinstance(size, str) else size for size in tensor.shape]
                for bound in ("min", "opt", "max")
            ]
            profile.set_shape(tensor.name, *sizes)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, "SM{}{}".format(*compute_capability)), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"TensorRT-RTX cannot compile {file.name}", received="; ".join(log.errors))
    return bytes(engine)


def timed_rtx_check(file: Path, spec: GraphSpec) -> dict[str, float]:
    """Compile ``file`` and return seconds and engine size; the engine is dropped.

    Raises:
        ExportError: as :func:`rtx_engine_from_onnx` does, or if the compiler takes its process down.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        given, report = Path(temporary, "spec.json"), Path(temporary, "report.json")
        given.write_bytes(msgspec.json.encode(spec))
        done = run_child(__name__, file, given, report)
        if done.returncode:
            raise ExportError(
                f"the exported graph does not compile with TensorRT-RTX: {file.name}",
                received="\n    ".join([f"exit code {done.returncode}; its last lines:", *done.lines[-8:]]),
                hint="no bundle was written; report this with the versions in use, or leave it out: --engine-check off",
            )
        return msgspec.json.decode(report.read_bytes(), type=dict[str, float])


def main(file: str, spec: str, report: str) -> None:
    """Compile ``file`` for ``spec`` and write the report."""
    start = time.perf_counter()
    engine = rtx_engine_from_onnx(Path(file), msgspec.json.decode(Path(spec).read_bytes(), type=GraphSpec))
    measured = {"compile_s": round(time.perf_counter() - start, 1), "engine_size_bytes": len(engine)}
    Path(report).write_bytes(msgspec.json.encode(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
