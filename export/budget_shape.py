"""The budget as a shape instead of a value: the graph of a bundle with an input that servers can batch.

All images of one run share one ``budget``, an int64 scalar. A server that puts requests together (Triton's dynamic
batcher) needs a batch axis on every input, and must not put different budgets together. Both come at once where the
*width* of a tensor is the budget: ``keep``, bool ``[batch, budget]``, has the axis, and requests of different shapes
are not batched. What it holds is never read.

Triton's own means, a TensorRT shape tensor, would be wrong: its batcher compares the values of two requests with
``strncmp`` (``scheduler_utils.cc`` of its core), to which 256 and 512 are equal, and its TensorRT backend counts no
value in a scalar and writes the batch size where the first one belongs (``shape_tensor.cc``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from flashvlm_export.specs import GraphSpec, TensorSpec

KEEP = TensorSpec("keep", "bool", ("batch", "budget"))


def spec_with_budget_shape(spec: GraphSpec) -> GraphSpec:
    """Return the contract of :func:`graph_with_budget_shape`: ``keep`` in the place of ``budget``."""
    return replace(spec, inputs=tuple(KEEP if tensor.name == "budget" else tensor for tensor in spec.inputs))


def graph_with_budget_shape(file: Path) -> onnx.ModelProto:
    """Return the graph of ``file`` with ``keep`` in the place of ``budget``; external weights are not read.

    1. The input ``budget`` is replaced by the input ``keep``.
    2. Two nodes in front make the scalar ``budget`` of the width of ``keep``; what reads it stays as it is.

    Post: with the budget as the width of ``keep``, the outputs are bit for bit those of ``file``. A width beyond the
    visual tokens there are keeps all of them, and a width of zero none: the caller sees it by the outputs' shape.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    place = [value.name for value in graph.input].index("budget")
    graph.input[place].CopyFrom(helper.make_tensor_value_info(KEEP.name, TensorProto.BOOL, list(KEEP.shape)))
    width = f"{KEEP.name}_width"
    graph.node.insert(0, helper.make_node("Shape", [KEEP.name], [width], name=f"node_{width}", start=1, end=2))
    graph.node.insert(1, helper.make_node("Squeeze", [width], ["budget"], name="node_budget_of_width"))
    return model
