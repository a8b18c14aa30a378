"""The INT8 graph itself, against NumPy and the float graphs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from flashvlm_export.bundle import Bundle
from flashvlm_export.calibration.checks import check_int8_file, take_census
from flashvlm_export.calibration.layers import find_layers, find_products
from flashvlm_export.calibration.observers import Range
from flashvlm_export.calibration.qdq import partly_quantised, qdq_from_fp16, save_graph, scale_of
from flashvlm_export.calibration.ranges import decode_ranges
from flashvlm_export.calibration.readings import load_structure, moved
from flashvlm_export.errors import BundleError, CalibrationError
from flashvlm_export.specs import Array

Calibrated = tuple[Path, dict[str, Any]]


def session(file: Path, *outputs: str) -> onnxruntime.InferenceSession:
    """A session of ``file`` with more of its values as outputs, nothing fused."""
    model = onnx.load(file)
    for name in outputs:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT16, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(dtype: str, seed: int = 3) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "pixel_values": rng.standard_normal((2, 3, 56, 56)).astype(np.float32),
        "text_embeds": rng.standard_normal((2, 5, 64)).astype(dtype),
        "text_mask": np.ones((2, 5), np.bool_),
        "budget": np.array(16, np.int64),
    }


@pytest.fixture(scope="module")
def graph(calibrated: Calibrated) -> onnx.GraphProto:
    return onnx.load(calibrated[0] / "visual.int8.onnx").graph


def test_every_linear_layer_of_encoder_and_projector_is_a_product(tiny_bundle: Path) -> None:
    fp16 = load_structure(tiny_bundle / "visual.fp16.onnx").graph
    products = find_products(fp16)
    # 3 of 4 layers run (vision_feature_layer -2), each q, k, v, out, fc1, fc2; one more query of CLS; the projector.
    assert len(products) == 3 * 6 + 1 + 2
    shapes = [product.shape for product in products]
    assert (shapes.count((32, 32)), shapes.count((32, 64)), shapes.count((64, 32))) == (3 * 4 + 1, 3 + 1, 3)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(32, [4, 2, 4, 2, 5, 2, 2]), (4, [6, 6, 7, 2]), (2, [19, 2]), (1, [19, 2])],
)
def test_layers_are_sublayers_blocks_or_less(tiny_bundle: Path, most: int, sizes: list[int]) -> None:
    fp16 = load_structure(tiny_bundle / "visual.fp16.onnx").graph
    products = find_products(fp16)
    layers = find_layers(fp16, products, most)
    assert [len(layer.products) for layer in layers] == sizes
    assert [product for layer in layers for product in layer.products] == products
    assert layers[-1].name == "projector"
    # Two products share the last layer's query weights.
    assert sum(layer.weights for layer in layers) == 3 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 64 + 64 * 64


def test_a_graph_in_float32_has_nothing_to_quantise(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no matrix products"):
        find_products(load_structure(tiny_bundle / "visual.fp32.onnx").graph)


def test_weights_are_int8_per_channel_within_half_a_step_of_float32(tiny_bundle: Path, graph: onnx.GraphProto) -> None:
    """The fp32 graph's weights are the oracle: same products, in the same order."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dequantised = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    float_graph = onnx.load(tiny_bundle / "visual.fp32.onnx").graph
    originals = {tensor.name: numpy_helper.to_array(tensor) for tensor in float_graph.initializer}
    wanted = [
        originals[node.input[1]]
        for node in float_graph.node
        if node.op_type == "MatMul" and node.input[1] in originals and originals[node.input[1]].ndim == 2
    ]
    found = [
        dequantised[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in dequantised
    ]
    assert len(found) == len(wanted) == 21
    for node, want in zip(found, wanted, strict=True):
        levels, scales, zeros = (stored[name] for name in node.input)
        assert (levels.dtype, scales.dtype, zeros.dtype) == (np.int8, np.float16, np.int8)
        assert scales.shape == (want.shape[1],)
        assert not zeros.any()
        assert next(attribute.i for attribute in node.attribute if attribute.name == "axis") == 1
        scales = scales.astype(np.float32)
        np.testing.assert_allclose(scales, np.abs(want).max(0) / 127, rtol=3e-3)
        assert (np.abs(levels * scales - want) <= 0.5 * scales + 2e-3 * np.abs(want)).all()
        assert np.abs(levels.astype(int)).max(0).min() >= 126


def test_activations_are_quantised_with_the_cached_ranges(calibrated: Calibrated, graph: onnx.GraphProto) -> None:
    ranges = decode_ranges(calibrated[0] / "calibration" / "ranges.json")
    assert ranges is not None
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    assert set(nodes) == set(ranges.tensors)
    for name, seen in ranges.tensors.items():
        scale, zero = stored[nodes[name].input[1]], stored[nodes[name].input[2]]
        assert (scale.dtype, zero.dtype, scale.shape) == (np.float16, np.int8, ())
        assert float(scale) == pytest.approx(max(-seen.lowest, seen.highest) / 127, rel=2e-3)
        assert zero == 0


def test_ranges_are_those_of_the_float_graph_on_the_calibration_images(calibrated: Calibrated, photos: Path) -> None:
    """Measured again here, through the fp32 graph and the runtime's own pipeline stages."""
    from flashvlm_export.runtime.graph_inputs import GraphInputs
    from flashvlm_export.specs import Precision

    ranges = decode_ranges(calibrated[0] / "calibration" / "ranges.json")
    assert ranges is not None
    assert len(ranges.images) == 5
    inputs = GraphInputs(Bundle.open(calibrated[0]))
    file = calibrated[0] / "visual.fp16.onnx"
    watched = session(file, *ranges.tensors)
    rows = inputs.text_rows("anything", Precision.FP16)
    outputs = [watched.run(list(ranges.tensors), inputs.feeds(photos / name, rows, 4)) for name in ranges.images]
    for number, seen in enumerate(ranges.tensors.values()):
        values = np.concatenate([found[number].ravel() for found in outputs]).astype(np.float32)
        # Nothing is fused here, so that float16 is rounded in other places.
        assert seen.lowest == pytest.approx(values.min(), rel=0.02, abs=0.02)
        assert seen.highest == pytest.approx(values.max(), rel=0.02, abs=0.02)


def test_a_quantised_product_computes_what_numpy_does(tiny_bundle: Path, calibrated: Calibrated) -> None:
    """First product of the first layer: its input from the float graph, the rest by hand."""
    fp16 = tiny_bundle / "visual.fp16.onnx"
    product = find_products(load_structure(fp16).graph)[0]
    node = next(node for node in onnx.load(fp16).graph.node if node.name == product.node)
    given = session(fp16, product.activation).run([product.activation], feeds("float16"))[0].astype(np.float64)
    ranges = decode_ranges(calibrated[0] / "calibration" / "ranges.json")
    assert ranges is not None
    scale = scale_of(ranges.tensors[product.activation].amax)
    weights = next(
        numpy_helper.to_array(tensor) for tensor in onnx.load(fp16).graph.initializer if tensor.name == product.weight
    ).astype(np.float64)
    steps = (np.abs(weights).max(0) / 127).astype(np.float16).astype(np.float64)
    expected = (np.clip(np.rint(given / scale), -128, 127) * scale) @ (np.rint(weights / steps) * steps)
    int8 = session(calibrated[0] / "visual.int8.onnx", node.output[0])
    found = int8.run([node.output[0]], feeds("float16"))[0].astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=6e-3 * np.abs(expected).max())
    assert np.abs(found - given @ weights).max() > 1e-3  # quantised, not passed through


def test_visual_tokens_of_int8_are_close_to_float32(calibrated: Calibrated) -> None:
    outputs = ["visual_tokens", "visual_indices", "scores"]
    int8 = session(calibrated[0] / "visual.int8.onnx").run(outputs, feeds("float16"))
    fp32 = session(calibrated[0] / "visual.fp32.onnx").run(outputs, feeds("float32"))
    want, have = fp32[0].astype(np.float64), int8[0].astype(np.float64)
    cosine = (want * have).sum(-1) / np.linalg.norm(want, axis=-1) / np.linalg.norm(have, axis=-1)
    assert 0.99 < cosine.mean() < 0.999999
    np.testing.assert_array_equal(int8[1], fp32[1])  # budget 16 keeps all


def test_rows_of_a_batch_do_not_influence_each_other(calibrated: Calibrated) -> None:
    int8 = session(calibrated[0] / "visual.int8.onnx")
    both = feeds("float16")
    alone = {name: array if name == "budget" else array[1:] for name, array in both.items()}
    np.testing.assert_array_equal(int8.run(None, both)[0][1:], int8.run(None, alone)[0])


def test_census(calibrated: Calibrated, graph: onnx.GraphProto) -> None:
    path, printed = calibrated
    census = printed["checks"]["census"]
    assert (census["int8_products"], census["float_products"]) == (21, 0)
    weights = 3 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 64 + 64 * 64
    # Zero points come on top, one per channel and tensor.
    assert weights < census["int8_weight_bytes"] < 1.1 * weights
    assert census["selection_nodes"] > 50
    # int8 in place of float32: a quarter, and of the rest (patch and position embeddings, biases) half.
    rest = 200_320 - 4 * weights
    assert census["weights_of_fp32"] == pytest.approx((weights + rest / 2) / 200_320, abs=0.03)
    assert Bundle.open(path).manifest.checks["int8"]["census"] == census
    assert {op.version for op in onnx.load(path / "visual.int8.onnx").opset_import if not op.domain} == {20}


def test_selection_in_half_precision_does_not_pass(graph: onnx.GraphProto, tmp_path: Path) -> None:
    """A Q/DQ pair put into selection, and selection fed in float16, are both found."""
    broken = onnx.GraphProto()
    broken.CopyFrom(graph)
    scores = next(node for node in broken.node if "scores" in node.output)
    scale = next(node.input[1] for node in graph.node if node.op_type == "QuantizeLinear")
    broken.node.append(onnx.helper.make_node("DequantizeLinear", ["anything", scale], ["scaled"]))
    scores.input[0] = "scaled"
    with pytest.raises(CalibrationError, match="selection is not float32"):
        take_census(broken)
    half = onnx.GraphProto()
    half.CopyFrom(graph)
    for value in half.value_info:
        if value.name == "patch_features":
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(CalibrationError, match="patch_features"):
        take_census(half)


def test_a_graph_with_fewer_int8_products_than_meant_does_not_pass(calibrated: Calibrated) -> None:
    assert check_int8_file(calibrated[0] / "visual.int8.onnx", 21).int8_products == 21
    with pytest.raises(CalibrationError, match="not every layer"):
        check_int8_file(calibrated[0] / "visual.int8.onnx", 22)


def test_with_no_layer_quantised_the_graph_is_the_float_one(tiny_bundle: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(tiny_bundle / "visual.fp16.onnx", tmp_path))
    shutil.copy(tiny_bundle / "visual.fp16.onnx.data", tmp_path)
    structure = load_structure(source)
    products = find_products(structure.graph)
    ranges = {product.activation: Range(-4.0, 4.0, 4.0) for product in products}
    (tmp_path / "work").mkdir()
    qdq_from_fp16(source, products, ranges, tmp_path / "work" / "full.onnx")
    full = moved(load_structure(tmp_path / "work" / "full.onnx"), "work")
    nothing = partly_quantised(full, structure, products, [])
    assert not [node for node in nothing.graph.node if "Linear" in node.op_type]
    onnx.load_external_data_for_model(nothing, str(tmp_path))
    save_graph(nothing, tmp_path / "nothing.onnx")
    have = session(tmp_path / "nothing.onnx").run(None, feeds("float16"))
    want = session(source).run(None, feeds("float16"))
    for one, other in zip(want, have, strict=True):
        np.testing.assert_array_equal(one, other)
    one_layer = partly_quantised(full, structure, products, [products[0].node])
    assert sum(node.op_type == "QuantizeLinear" for node in one_layer.graph.node) == 1
    assert sum(node.op_type == "DequantizeLinear" for node in one_layer.graph.node) == 2


@pytest.mark.parametrize(("amax", "scale"), [(127.0, 1.0), (0.0, 2.0**-14), (1e-9, 2.0**-14), (60000.0, 472.5)])
def test_scales_are_float16_and_never_zero(amax: float, scale: float) -> None:
    assert scale_of(amax) == scale


def test_a_wide_range_does_not_overflow(tiny_bundle: Path, tmp_path: Path) -> None:
    """Twice the range is beyond float16; an activation there is float16 itself, so its scale is not."""
    source = tiny_bundle / "visual.fp16.onnx"
    products = find_products(load_structure(source).graph)
    ranges = {product.activation: Range(-60000.0, 60000.0, 60000.0) for product in products}
    ranges[products[0].activation] = Range(0.0, 0.0, 0.0)
    qdq_from_fp16(source, products, ranges, tmp_path / "wide.onnx")
    graph = onnx.load(tmp_path / "wide.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = {node.input[0]: float(stored[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"}
    assert scales.pop(products[0].activation) == pytest.approx(2.0**-14, rel=2e-3)
    assert set(scales.values()) == {scale_of(60000.0)}


def test_tensorrt_rtx_compiles_it(calibrated: Calibrated) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling needs TensorRT-RTX")
    from flashvlm_export.export.engine_check import check_engine_builds

    spec = Bundle.open(calibrated[0]).manifest.graphs["int8"].spec
    assert check_engine_builds(calibrated[0] / "visual.int8.onnx", spec)["engine_size_bytes"] > 100_000
