"""Ranges → explicit Q/DQ graph, with ONNX Runtime's ``QDQQuantizer``.

Weights: int8, symmetric, one scale per output channel, stored as int8. Activations: int8, symmetric, one scale per
tensor. Scales are float16, the type of what is around them, so that the graph stays strongly typed (opset 20).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx

from flashvlm_export.calibration.layers import Product
from flashvlm_export.calibration.observers import Range
from flashvlm_export.calibration.readings import load_structure

# What is larger goes into the data file, as in exported graphs.
_INLINE_BYTES = 1024
# Symmetric INT8 uses -127..127.
_LEVELS = 127
# The smallest scale that float16 holds with its full precision.
_TINY = float(np.finfo(np.float16).smallest_normal)


def qdq_from_fp16(source: Path, products: Sequence[Product], tensors: dict[str, Range], file: Path) -> None:
    """Write ``file`` (weights in ``file.data``): the graph of ``source`` with every product quantised."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = load_structure(source)
    # Before the weights are there: types are all that the quantiser wants to know, and a copy of them is spared.
    model = onnx.shape_inference.infer_shapes(model)
    onnx.load_external_data_for_model(model, str(source.parent))
    _name_float16(model, products)
    ranges = {name: _symmetric(found.amax) for name, found in tensors.items()}
    quantizer = QDQQuantizer(
        model,
        True,  # per_channel
        False,  # reduce_range
        QuantType.QInt8,
        QuantType.QInt8,
        TensorsData(
            CalibrationMethod.MinMax,
            {name: TensorData(lowest=-amax, highest=amax) for name, amax in ranges.items()},
        ),
        [product.node for product in products],
        [],
        ["MatMul", "Gemm"],
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            # Biases and residuals are added in float16; INT8 is what the next product reads, not what this one writes.
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
        },
    )
    quantizer.quantize_model()
    save_graph(quantizer.model.model, file)


def partly_quantised(
    full: onnx.ModelProto, original: onnx.ModelProto, products: Sequence[Product], quantised: Collection[str]
) -> onnx.ModelProto:
    """Return ``full`` with INT8 in the products whose nodes are among ``quantised``, and nowhere else.

    ONNX Runtime lets every reader of a quantised activation read its INT8 form: residuals, LayerNorm and selection,
    which take patch features from what the projector reads, would be rounded too. They get the values of ``original``
    back. Weights stay in the files that both models refer to.
    """
    model = onnx.ModelProto()
    model.CopyFrom(full)
    quantisers = {node.output[0]: node.input[0] for node in full.graph.node if node.op_type == "QuantizeLinear"}
    floats = {
        node.output[0]: quantisers[node.input[0]]
        for node in full.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantisers
    }
    by_node = {product.node: product for product in products}
    for node in model.graph.node:
        if node.name not in quantised:
            for position, name in enumerate(node.input):
                node.input[position] = floats.get(name, name)
            if node.name in by_node:
                node.input[1] = by_node[node.name].weight
    known = {tensor.name for tensor in model.graph.initializer}
    wanted = {product.weight for product in products if product.node not in quantised} - known
    model.graph.initializer.extend(tensor for tensor in original.graph.initializer if tensor.name in wanted)
    _drop_unused(model.graph)
    return model


def save_graph(model: onnx.ModelProto, file: Path) -> None:
    """Write ``model``, its weights in memory, to ``file`` and ``file.data``."""
    data = file.with_name(f"{file.name}.data")
    for path in (file, data):
        path.unlink(missing_ok=True)  # onnx appends to a data file that is there
    _sort_nodes(model.graph)
    model.producer_name, model.producer_version = "flashvlm-export", ""
    onnx.save(model, file, save_as_external_data=True, location=data.name, size_threshold=_INLINE_BYTES)
    # onnx writes the data file for its owner alone; a bundle is read by whom its other files are read.
    data.chmod(file.stat().st_mode)


def scale_of(amax: float) -> float:
    """Return the float16 scale of a tensor whose largest magnitude to cover is ``amax``."""
    return float(np.float16(max(amax / _LEVELS, _TINY)))


def _symmetric(amax: float) -> np.ndarray[tuple[()], np.dtype[np.float16]]:
    """Return the range that makes the quantiser arrive at :func:`scale_of`; a tensor of zeros gets the smallest."""
    return np.array(scale_of(amax) * _LEVELS, np.float16)


def _name_float16(model: onnx.ModelProto, products: Sequence[Product]) -> None:
    """Declare the products' inputs float16 where shape inference did not get through to them."""
    known = {value.name for value in model.graph.value_info}
    for name in dict.fromkeys(product.activation for product in products):
        if name not in known:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None))


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove Q/DQ nodes and stored tensors that nothing reads any more."""
    while True:
        used = {output.name for output in graph.output} | _read_by(graph)
        unused = [
            node
            for node in graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not used.intersection(node.output)
        ]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put each node behind those that it reads from, and leave the order as it is otherwise.

    The quantiser appends its nodes behind all others; ONNX wants every value written before it is read.
    """
    producers = {output: node for node in graph.node for output in node.output}
    order: dict[int, onnx.NodeProto] = {}

    def place(node: onnx.NodeProto) -> None:  # as deep as Q/DQ nodes follow each other
        if id(node) not in order:
            for name in node.input:
                if name in producers:
                    place(producers[name])
            order[id(node)] = node

    # What a Loop reads from around it is no input of its node, but it is never a quantised value.
    nodes = list(graph.node)
    for node in nodes:
        place(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order.values()]
    del graph.node[:]
    graph.node.extend(copies)


def _read_by(graph: onnx.GraphProto) -> set[str]:
    """Return every name that a node reads, inside of Loops too."""
    names = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _read_by(attribute.g)
                names |= {output.name for output in attribute.g.output}
    return names
