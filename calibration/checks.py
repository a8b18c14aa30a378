"""Checks an INT8 graph has to pass before the bundle gets it.

1. ``onnx.checker`` with shape inference.
2. Census: as many products read int8 as were meant to; their weights are stored as int8; no Q/DQ node lies in
   selection, whose floating-point values are float32, and nothing but matrix products reads INT8.
3. Numbers: the file that ships against the floating-point graph, on images that did not set the ranges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from flashvlm_export.calibration.layers import PATCH_FEATURES, PROJECTED_TOKENS, tokens_and_features
from flashvlm_export.calibration.readings import Graph, Reading, load_structure
from flashvlm_export.calibration.samples import Sample
from flashvlm_export.errors import CalibrationError
from flashvlm_export.specs import VISUAL_OUTPUTS

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_PRODUCTS = ("MatMul", "Gemm")
_BYTES = {
    onnx.TensorProto.INT8: 1,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.FLOAT: 4,
}


@dataclass(frozen=True)
class Census:
    """What types the graph computes in.

    Attributes:
        int8_products: MatMul and Gemm nodes whose two factors come from int8.
        float_products: MatMul and Gemm nodes with stored weights in floating point.
        int8_weight_bytes: stored int8 values.
        float_weight_bytes: stored floating-point values, scales included.
        selection_nodes: nodes behind the patch features that decide what is kept.
    """

    int8_products: int
    float_products: int
    int8_weight_bytes: int
    float_weight_bytes: int
    selection_nodes: int


def check_int8_file(file: Path, int8_products: int) -> Census:
    """Run checks 1 and 2 on ``file`` and return the census.

    Raises:
        CalibrationError: naming the check that failed.
    """
    try:
        onnx.checker.check_model(file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CalibrationError("the ONNX checker rejects the INT8 graph", received=str(error)) from error
    model = onnx.shape_inference.infer_shapes(load_structure(file))
    census = take_census(model.graph)
    if census.int8_products != int8_products:
        raise CalibrationError(
            "not every layer of the INT8 graph is INT8",
            received=f"{census.int8_products} products read int8",
            expected=int8_products,
            hint="report this with the versions of onnx and onnxruntime in use",
        )
    return census


def take_census(graph: onnx.GraphProto) -> Census:
    """Return the census of a graph whose value types are inferred.

    Raises:
        CalibrationError: if selection is not float32 throughout or has a Q/DQ node in it, or if something other than a
            matrix product reads INT8.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    dequantised = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    quantised = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    int8, in_float = 0, 0
    for node in graph.node:
        if node.op_type in _PRODUCTS:
            sources = [dequantised[name].input[0] for name in node.input[:2] if name in dequantised]
            weights = [name for name in sources if name in stored and stored[name].data_type == onnx.TensorProto.INT8]
            int8 += len(weights) == 1 and len(quantised.intersection(sources)) == 1
            in_float += node.input[1] in stored
    selection = _selection_nodes(graph)
    _require_float32(graph, selection)
    strays = [
        node.name for node in graph.node if node.op_type not in _PRODUCTS and dequantised.keys() & set(node.input)
    ]
    if strays:
        raise CalibrationError(
            "INT8 is read outside of the matrix products",
            received=", ".join(strays),
            expected="residuals, LayerNorm and selection in floating point",
            hint="report this with the versions of onnx and onnxruntime in use",
        )
    sizes = dict.fromkeys(_BYTES, 0)
    for tensor in graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += math.prod(tensor.dims) * _BYTES[tensor.data_type]
    return Census(
        int8_products=int8,
        float_products=in_float,
        int8_weight_bytes=sizes[onnx.TensorProto.INT8],
        float_weight_bytes=sizes[onnx.TensorProto.FLOAT16] + sizes[onnx.TensorProto.FLOAT],
        selection_nodes=len(selection),
    )


def weight_bytes(graph: onnx.GraphProto) -> int:
    """Return the bytes of all stored int8, float16 and float32 values."""
    return sum(math.prod(t.dims) * _BYTES[t.data_type] for t in graph.initializer if t.data_type in _BYTES)


def shipped_readings(file: Path, references: Sequence[Reading], samples: Sequence[Sample]) -> list[Reading]:
    """Return what ``file`` as it ships makes of ``samples``: one run for the kept set, one for all visual tokens.

    No output is added to the graph: ONNX Runtime rounds float16 in other places when one is.

    Args:
        file: the INT8 graph.
        references: give patch features, and how many patches there are.
        samples: in the same order.
    """
    graph, readings = Graph(file), []
    for sample, reference in zip(samples, references, strict=True):
        feeds = sample.feeds()
        kept = graph.run(feeds, VISUAL_OUTPUTS)
        everything = np.array(len(reference.tokens), np.int64)
        tokens = graph.run({**feeds, "budget": everything}, VISUAL_OUTPUTS)["visual_tokens"]
        readings.append(
            Reading(tokens[0].astype(np.float32), reference.features, kept["visual_indices"][0], kept["scores"][0])
        )
    return readings


def _selection_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that lead from features and tokens to indices and scores."""
    producers = {output: node for node in graph.node for output in node.output}
    found: dict[str, onnx.NodeProto] = {}
    waiting = ["visual_indices", "scores"]
    while waiting:
        name = waiting.pop()
        # What selection starts from: features, tokens and saliency, each cast or computed in float32 by the encoder.
        if name in found or name not in producers or name in (PATCH_FEATURES, PROJECTED_TOKENS, "saliency"):
            continue
        found[name] = producers[name]
        waiting += producers[name].input
    return list({id(node): node for node in found.values()}.values())


def _require_float32(graph: onnx.GraphProto, selection: Sequence[onnx.NodeProto]) -> None:
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    inner = [
        node
        for outer in selection
        for attribute in outer.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
        for node in attribute.g.node
    ]
    half = [
        output
        for node in selection
        for output in node.output
        if types.get(output) in (onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8)
    ]
    quantised = [node.name for node in (*selection, *inner) if node.op_type in _QDQ]
    seen = dict.fromkeys(tokens_and_features(types))
    starts = [name for name in seen if types.get(name) != onnx.TensorProto.FLOAT]
    if half or quantised or starts or not selection:
        raise CalibrationError(
            "selection is not float32 in the INT8 graph",
            received=", ".join([*half, *quantised, *starts]) or "no selection nodes",
            expected="float32 from the patch features on",
            hint="report this with the versions of onnx and onnxruntime in use",
        )
