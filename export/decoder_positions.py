"""A decoder that is told where its tokens stand: rotary embedding as nodes of their own, fed by ``position_ids``.

onnxruntime-genai's builder has GroupQueryAttention rotate queries and keys by itself, and count the positions. The
operator also takes ``position_ids``, but on the CPU, in ONNX Runtime 1.23 and 1.32, it reads the first of a prompt and
counts up from there, without a word. RotaryEmbedding, which every execution provider of ONNX Runtime's own has, obeys
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from flashvlm_export.errors import ExportError

POSITION_IDS = "position_ids"

# Inputs of GroupQueryAttention by place: three of queries, keys and values, caches and lengths up to 6, the rotation.
_QUERY, _KEY, _COS, _SIN = 0, 1, 7, 8


def take_positions(file: Path, head_size: int) -> None:
    """Rewrite the decoder in ``file`` so that it takes ``position_ids``, int64 ``[batch_size, sequence_length]``.

    Only the graph is written, weights stay in their file. ``head_size`` is what has to be rotated of each head.

    Raises:
        ExportError: if its attention is not GroupQueryAttention that rotates whole heads and nothing besides.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            nodes += _rotate_before(node, graph, head_size)
        nodes.append(node)
    if len(nodes) == len(graph.node):
        raise _unknown("no such attention")
    del graph.node[:]
    graph.node.extend(nodes)
    shape = ["batch_size", "sequence_length"]
    graph.input.append(helper.make_tensor_value_info(POSITION_IDS, onnx.TensorProto.INT64, shape))
    onnx.save(model, str(file))


def _rotate_before(node: NodeProto, graph: Any, head_size: int) -> list[NodeProto]:
    """Take the rotation out of ``node`` and return it as nodes that go before."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    rotates = "do_rotary" in attributes and attributes["do_rotary"].i == 1 and not any(node.input[_SIN + 1 :])
    caches = [value for value in graph.initializer if value.name in node.input[_COS : _SIN + 1]]
    if not rotates or [cache.dims[1] for cache in caches] != [head_size // 2] * 2:
        raise _unknown(
            f"{node.name} with inputs {', '.join(name for name in node.input if name)}, rotated by "
            f"{', '.join(f'{cache.name}{list(cache.dims)}' for cache in caches)}"
        )
    before = []
    if not node.input[_KEY]:  # queries, keys and values in one tensor
        widths = [attributes[f"{kind}num_heads"].i * head_size for kind in ("", "kv_", "kv_")]
        sizes, parts = f"{node.name}/widths", [f"{node.name}/{part}" for part in ("query", "key", "value")]
        graph.initializer.append(numpy_helper.from_array(np.array(widths, np.int64), sizes))
        before.append(helper.make_node("Split", [node.input[_QUERY], sizes], parts, f"{node.name}/Split", axis=-1))
        node.input[:3] = parts
    for place in (_QUERY, _KEY):
        rotated = f"{node.input[place]}/rotated"
        inputs = [node.input[place], POSITION_IDS, node.input[_COS], node.input[_SIN]]
        interleaved = attributes["rotary_interleaved"].i if "rotary_interleaved" in attributes else 0
        before.append(
            helper.make_node(
                "RotaryEmbedding", inputs, [rotated], f"{rotated}/op", domain="com.microsoft", interleaved=interleaved
            )
        )
        node.input[place] = rotated
    attributes["do_rotary"].i = 0
    del node.input[_COS:]
    return before


def _unknown(received: str) -> ExportError:
    return ExportError(
        "the decoder cannot be made to take positions",
        received=received,
        expected="GroupQueryAttention that rotates whole heads, and does nothing besides",
        hint="pip install --upgrade onnxruntime-genai",
    )
