"""Outputs of a graph in ONNX Runtime, and graphs that give more of them away.

Graphs are handled without their weights: these stay in their files, and only ONNX Runtime reads them. It wants them in
the directory of the graph or below, and neither it nor onnx follows links; so the graphs that are written here for a
moment lie in the bundle itself, under a hidden name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from flashvlm_export.calibration.layers import tokens_and_features
from flashvlm_export.errors import CalibrationError
from flashvlm_export.ort import ort_session
from flashvlm_export.specs import Array, Feeds


@dataclass(frozen=True)
class Reading:
    """What a graph makes of one image.

    Attributes:
        tokens: float32 ``[N, D]``, visual tokens of every patch.
        features: float32 ``[N, C]``, patch features.
        kept: int64 ``[K]``, the kept patches, ascending.
        scores: float32 ``[N]``.
    """

    tokens: Array
    features: Array
    kept: Array
    scores: Array


class Graph:
    """An ONNX file in ONNX Runtime on the CPU.

    Args:
        file: with its weights beside it.

    Raises:
        SessionError: if ONNX Runtime cannot load it.
    """

    def __init__(self, file: Path) -> None:
        self._session: Any = ort_session(file, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self._session.get_outputs()]
        types = {given.name: given.type for given in self._session.get_inputs()}
        self._float_dtype = np.float16 if types.get("text_embeds") == "tensor(float16)" else np.float32

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return outputs by name; ``text_embeds`` may come in another precision than the graph's."""
        names = list(names or self.outputs)
        given = {**feeds, "text_embeds": feeds["text_embeds"].astype(self._float_dtype, copy=False)}
        return dict(zip(names, self._session.run(names, given), strict=True))

    def read(self, feeds: Feeds) -> Reading:
        """Return the reading of a graph written by :func:`with_outputs` with features and tokens among its outputs."""
        names = (*tokens_and_features(self.outputs), "visual_indices", "scores")
        found = self.run(feeds, list(dict.fromkeys(names)))
        return Reading(*(found[name][0] for name in names))


def load_structure(file: Path) -> onnx.ModelProto:
    """Return the model; weights that lie in a file beside it are left there."""
    return onnx.load(file, load_external_data=False)


def with_outputs(model: onnx.ModelProto, names: Sequence[str], dtype: int) -> onnx.ModelProto:
    """Return a copy of ``model`` that has the values ``names`` of type ``dtype`` as outputs too.

    Raises:
        CalibrationError: if there is no such value in the graph.
    """
    inside = {output for node in model.graph.node for output in node.output}
    missing = [name for name in names if name not in inside]
    if missing:
        raise CalibrationError(
            "the graph does not hold the values that calibration looks at",
            received=f"no {', '.join(missing)}",
            expected="a graph as this version exports it",
            hint="export the bundle again",
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, dtype, None) for name in names)
    return copy


def opened(model: onnx.ModelProto, file: Path) -> Graph:
    """Open ``model``; it is written to ``file`` for that, from where its weights have to be found."""
    try:
        onnx.save(model, file)
        return Graph(file)
    finally:
        file.unlink(missing_ok=True)


def readable_graph(model: onnx.ModelProto, file: Path) -> Graph:
    """Open ``model`` with what :meth:`Graph.read` needs; see :func:`opened`."""
    inside = {output for node in model.graph.node for output in node.output}
    seen = dict.fromkeys(tokens_and_features(inside))
    return opened(with_outputs(model, list(seen), onnx.TensorProto.FLOAT), file)


def moved(model: onnx.ModelProto, folder: str) -> onnx.ModelProto:
    """Make the weights of ``model`` be looked for in ``folder`` below its own directory; return ``model``."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{folder}/{entry.value}"
    return model
