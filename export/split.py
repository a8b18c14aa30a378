"""The fused graph in two: an encoder that sees each image once, and selectors that choose for each question.

The encoder shares the fused graph's file of weights. A selector has none: several can stand in one bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from flashvlm_export.export.checks import SelectorCase, check_split
from flashvlm_export.export.engine_check import check_engine_builds
from flashvlm_export.export.onnx_graph import ExportedGraph, encoder_from_probe, onnx_from_selector
from flashvlm_export.export.visual_graph import SelectorGraph
from flashvlm_export.manifest import GraphEntry, SelectorEntry, SplitGraphs
from flashvlm_export.models.adapter import Adapter, GraphInputs
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import Precision, encoder_spec, selector_spec


def write_split_graphs(
    graph: ExportedGraph,
    adapter: Adapter,
    configs: Mapping[str, Any],
    precision: Precision,
    *,
    compile_engines: bool,
    progress: Callable[[str], None],
) -> tuple[SplitGraphs, dict[str, dict[str, float]]]:
    """Write and check the encoder and one graph per selector beside ``graph``.

    Args:
        graph: the fused graph, its probe with saliency.
        adapter: of the model.
        configs: settings by selector; first the fused graph's own.
        precision: of ``graph``.
        compile_engines: also compile each with TensorRT-RTX.
        progress: hears what is done.

    Returns:
        Their entries for the manifest, and what was measured.

    Raises:
        ExportError: if a graph cannot be written, or fails a check.
    """
    folder = graph.file.parent
    progress("encoder alone")
    encoder = GraphEntry(f"encoder.{precision.value}.onnx", encoder_spec(adapter.dims, precision))
    encoder_from_probe(graph, encoder.spec, folder / encoder.file)
    inputs = _selector_inputs(adapter, precision)
    selectors = {}
    for name, config in configs.items():
        progress(f"selector {name} alone")
        entry = SelectorEntry(f"selector.{name}.{precision.value}.onnx", inputs.spec, asdict(config))
        onnx_from_selector(SelectorGraph(get_selector(name).make_module(config)), inputs, folder / entry.file)
        selectors[name] = entry
    cases = [SelectorCase(folder / entry.file, configs[name]) for name, entry in selectors.items()]
    checks = {"split": asdict(check_split(graph, folder / encoder.file, cases, adapter, precision, progress))}
    if compile_engines:
        parts: list[GraphEntry | SelectorEntry] = [encoder, *selectors.values()]
        for part in parts:
            progress(f"compile {part.file} with TensorRT-RTX")
            checks[f"tensorrt_rtx {part.file}"] = check_engine_builds(folder / part.file, part.spec)
    return SplitGraphs(encoder, selectors), checks


def _selector_inputs(adapter: Adapter, precision: Precision) -> GraphInputs:
    """Return seeded random sample inputs of a selector, with its contract."""
    batch, count = 2, adapter.sample_patches
    question = adapter.inputs(precision, batch=batch, text=9, budget=max(1, count // 3)).tensors[-3:]
    dtype = question[0].dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torch.randn(batch, count, adapter.dims.vision_width).to(dtype)
        saliency = torch.randn(batch, count).softmax(-1)
        tokens = torch.randn(batch, count, adapter.dims.llm_width).to(dtype)
    return GraphInputs((features, saliency, tokens, *question), selector_spec(adapter.dims, precision))
