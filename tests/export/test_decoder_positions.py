"""Decoders that cannot be made to take positions; ``test_decoder.py`` has those that can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from flashvlm_export.errors import ExportError
from flashvlm_export.export.decoder_positions import take_positions

HEAD = 16


def write(file: Path, *, rotated: int = HEAD, extra: str = "", **attributes: Any) -> Path:
    """One attention of two heads, whose rotation covers ``rotated`` of each head's channels."""
    caches = [numpy_helper.from_array(np.ones((8, rotated // 2), np.float32), name) for name in ("cos", "sin")]
    inputs = ["qkv", "", "", "past_key", "past_value", "seqlens", "total", "cos", "sin", "", "", extra]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        ["out", "key", "value"],
        "attention",
        domain="com.microsoft",
        **{"num_heads": 2, "kv_num_heads": 2, "do_rotary": 1, **attributes},
    )
    nodes = [node] if attributes.get("num_heads") != 0 else [helper.make_node("Identity", ["qkv"], ["out"])]
    value = helper.make_tensor_value_info("qkv", onnx.TensorProto.FLOAT, [1, "n", 6 * HEAD])
    result = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, "n", 2 * HEAD])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [value], [result], caches)), file)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "no such attention"),
        ({"do_rotary": 0}, "attention with inputs qkv"),
        ({"rotated": HEAD // 2}, r"rotated by cos\[8, 4\], sin\[8, 4\]"),
        ({"extra": "sinks"}, "sinks"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.onnx", **change)
    before = file.read_bytes()
    with pytest.raises(ExportError, match=message):
        take_positions(file, HEAD)
    assert file.read_bytes() == before


def test_the_rotation_moves_out_of_the_attention(tmp_path: Path) -> None:
    file = write(tmp_path / "model.onnx")
    take_positions(file, HEAD)
    graph = onnx.load(file).graph
    assert [node.op_type for node in graph.node] == [
        "Split",
        "RotaryEmbedding",
        "RotaryEmbedding",
        "GroupQueryAttention",
    ]
    assert [list(node.input)[1] for node in graph.node if node.op_type == "RotaryEmbedding"] == ["position_ids"] * 2
    assert "cos" not in graph.node[-1].input
