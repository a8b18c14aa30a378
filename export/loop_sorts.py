"""Sorting inside a loop, for rows whose length is an input's: what TensorRT-RTX 1.7 needs to compile it.

A sort is a TopK over the whole row, whose ``K`` TensorRT has to know before the loop begins; it does not find out that
a loop keeps the shape of what it carries ("Shape tensor … is not initialized"). So rows are sorted in one fixed length,
that of the longest, with padding behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

_LEAST = np.float32(np.finfo(np.float32).min)


def sort_in_fixed_length(graph: ir.Graph, longest: int) -> None:
    """Rewrite every sort of ``[B, N]`` from high to low in a loop, where ``N`` is no number, for ``N <= longest``."""
    for loop in [node for node in graph if node.op_type == "Loop"]:
        body = loop.attributes["body"].as_graph()
        for sort in [node for node in body if node.op_type == "TopK"]:
            (row, size), dims = sort.inputs, _dims(sort.inputs[0])
            if size is None or size.const_value is not None or isinstance(dims[-1], int):
                continue
            twin = next(
                value
                for node in body
                for value in node.inputs
                if value is not None and value.graph is graph and _dims(value) == dims
            )
            before = _Before(graph, loop, str(sort.name))
            place, padding = _padding(before, twin, longest)
            fixed = before.constant([longest])
            padded = ir.node("ScatterElements", [padding, place, row], {"axis": 1}, name=f"{sort.name}_padded")
            whole = ir.node(
                "TopK", [padded.outputs[0], fixed], sort.attributes, num_outputs=2, name=f"{sort.name}_whole"
            )
            nodes = [padded, whole]
            for node in nodes:
                for number, output in enumerate(node.outputs):
                    output.name = f"{node.name}_{number}"
            for old, new in zip(sort.outputs, whole.outputs, strict=True):
                cut = ir.node("GatherElements", [new, place], {"axis": 1}, name=f"{old.name}_cut")
                cut.outputs[0].name, cut.outputs[0].shape, cut.outputs[0].type = cut.name, old.shape, old.type
                ir.convenience.replace_all_uses_with(old, cut.outputs[0])
                nodes.append(cut)
            body.insert_before(sort, nodes)
            body.remove(sort, safe=True)


class _Before:
    """Makes nodes in front of a loop, each with a name of its own."""

    def __init__(self, graph: ir.Graph, loop: ir.Node, name: str) -> None:
        self.graph, self.loop, self.name = graph, loop, name
        self.count = 0

    def __call__(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        made = ir.node(kind, inputs, attributes, name=f"{self.name}_before_{self.count}")
        made.outputs[0].name = f"{made.name}_output"
        self.count += 1
        self.graph.insert_before(self.loop, made)
        return made.outputs[0]

    def constant(self, value: int | list[int] | np.float32) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(value)))


def _padding(before: _Before, twin: ir.Value, longest: int) -> tuple[ir.Value, ir.Value]:
    """Return the places int64 ``[B, N]`` of the values of a row, and padding ``[B, longest]``."""
    batch = before("Shape", twin, start=0, end=1)
    count = before("Squeeze", before("Shape", twin, start=1, end=2))
    numbers = before("Range", before.constant(0), count, before.constant(1))
    wide = before("Concat", batch, before.constant([longest]), axis=0)
    return before("Expand", numbers, before("Shape", twin)), before("Expand", before.constant(_LEAST), wide)


def _dims(value: ir.Value | None) -> tuple[object, ...]:
    if value is None or value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
