"""A decoder that is told where its tokens stand: rotary embedding as nodes of their own, fed by ``position_ids``.

onnxruntime-genai's builder has GroupQueryAttention rotate queries and keys by itself, and count the positions. The
operator also takes ``position_ids``, but on the CPU, in ONNX Runtime 1.23 and 1.32, it reads the first of a prompt and
counts up from there, without a word. RotaryEmbedding, which every execution provider of ONNX Runtime's own has, obeys
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from flashvlm_export.errors import ExportError

POSITION_IDS = "position_ids"

# Inputs of GroupQueryAttention by place: three of queries, keys and values, caches and lengths up to 6, the rotation.
_QUERY, _KEY, _COS, _SIN = 0, 1, 7, 8


def take_positions(file: Path, head_size: int, sections: Sequence[int] = ()) -> None:
    """Rewrite the decoder in ``file`` so that it takes ``position_ids``, int64 ``[batch_size, sequence_length]``.

    Only the graph is written, weights stay in their file. ``head_size`` is what has to be rotated of each head.
    With ``sections``, positions are ``[batch_size, sequence_length, 3]``: the first of the rotary frequencies turn by
    the first number, the next by the second, and so on.

    Raises:
        ExportError: if its attention is not GroupQueryAttention that rotates whole heads and nothing besides.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    rotation: list[str] = []
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            caches = list(node.input[_COS : _SIN + 1])
            if not rotation and sections:
                made, rotation = _rows_by_section(graph, caches, sections)
                nodes += made
            nodes += _rotate_before(node, graph, head_size, rotation or [POSITION_IDS, *caches])
        nodes.append(node)
    if len(nodes) == len(graph.node):
        raise _unknown("no such attention")
    del graph.node[:]
    graph.node.extend(nodes)
    shape: list[str | int] = ["batch_size", "sequence_length", *([len(sections)] if sections else [])]
    graph.input.append(helper.make_tensor_value_info(POSITION_IDS, onnx.TensorProto.INT64, shape))
    onnx.save(model, str(file))


def _rows_by_section(graph: Any, caches: Sequence[str], sections: Sequence[int]) -> tuple[list[NodeProto], list[str]]:
    """Return nodes that make a row of cosines and of sines for each token, and the names of its rows' numbers and both.

    A row is put together of those of its numbers. The operator then looks them up by the token's own number.
    """
    name = f"{POSITION_IDS}/rows"
    ends = [sum(sections[: place + 1]) for place in range(len(sections))]
    constants = {f"{name}/axis_{axis}": np.array(axis, np.int64) for axis in range(len(sections))}
    constants |= {f"{name}/bound_{bound}": np.array([bound], np.int64) for bound in (0, *ends)}
    constants |= {
        f"{name}/flat": np.array([-1, ends[-1]], np.int64),
        f"{name}/last": np.array([-1], np.int64),
        f"{name}/none": np.array(0, np.int64),
        f"{name}/one": np.array(1, np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
    nodes, tables = [], []
    for cache in caches:
        parts = []
        for axis, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            numbers, rows, part = (f"{name}/{cache}_{axis}_{what}" for what in ("numbers", "rows", "part"))
            nodes += [
                helper.make_node("Gather", [POSITION_IDS, f"{name}/axis_{axis}"], [numbers], axis=2),
                helper.make_node("Gather", [cache, numbers], [rows], axis=0),
                helper.make_node(
                    "Slice", [rows, f"{name}/bound_{start}", f"{name}/bound_{end}", f"{name}/last"], [part]
                ),
            ]
            parts.append(part)
        joined, table = f"{name}/{cache}_joined", f"{name}/{cache}"
        nodes.append(helper.make_node("Concat", parts, [joined], axis=-1))
        nodes.append(helper.make_node("Reshape", [joined, f"{name}/flat"], [table]))
        tables.append(table)
    ids, shape, size, counted = (f"{name}/{what}" for what in ("ids", "shape", "size", "counted"))
    nodes += [
        helper.make_node("Shape", [POSITION_IDS], [shape], end=2),
        helper.make_node("ReduceProd", [shape], [size], keepdims=0),
        helper.make_node("Range", [f"{name}/none", size, f"{name}/one"], [counted]),
        helper.make_node("Reshape", [counted, shape], [ids]),
    ]
    for number, node in enumerate(nodes):
        node.name = f"{name}/op_{number}"
    return nodes, [ids, *tables]


def _rotate_before(node: NodeProto, graph: Any, head_size: int, rotation: Sequence[str]) -> list[NodeProto]:
    """Take the rotation out of ``node`` and return it as nodes that go before.

    ``rotation`` names the numbers of the rows of each token, and the tables of cosines and sines.
    """
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
        inputs = [node.input[place], *rotation]
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
