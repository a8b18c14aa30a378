"""What opening an ONNX Runtime session does besides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

helper = pytest.importorskip("onnx.helper", reason="writes a graph")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs it")

import onnx

# Opt-outs that ONNX Runtime knows, for people and for CI: none may help here.
_QUIET = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED", "DO_NOT_TRACK")
_CODE = """
import pathlib, sys
from flashvlm_export.ort import ort_session
ort_session(pathlib.Path(sys.argv[1]), providers=["CPUExecutionProvider"])
"""


def test_nothing_is_recorded_for_the_maker_of_onnx_runtime(tmp_path: Path) -> None:
    """Where it does, it writes a device id and a database of events into the home directory at once."""
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "g.onnx")

    def written(name: str, **variables: str) -> list[Path]:
        home = tmp_path / name
        home.mkdir()
        environment = {key: text for key, text in os.environ.items() if key not in _QUIET and "PYTEST" not in key}
        done = subprocess.run(
            [sys.executable, "-c", _CODE, str(tmp_path / "g.onnx")],
            env=environment | {"HOME": str(home), "XDG_CACHE_HOME": "", **variables},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return list(home.rglob("*"))

    assert written("quiet") == []
    # Who asks for it gets it. No such file is sent from here: the process ends before.
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 29):
        assert written("asked for", ORT_DISABLE_TELEMETRY="0") != []
