"""Torch module → ONNX files: one with the outputs that checks need, one that ships, weights shared between them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from flashvlm_export import interrupts
from flashvlm_export.errors import ExportError
from flashvlm_export.export.loop_sorts import sort_in_fixed_length
from flashvlm_export.export.translations import TRANSLATIONS
from flashvlm_export.export.visual_graph import SelectorGraph, VisualGraph
from flashvlm_export.models.adapter import GraphInputs
from flashvlm_export.specs import ENCODER_OUTPUTS, VISUAL_OUTPUTS, GraphSpec

OPSET = 20


@dataclass(frozen=True)
class ExportedGraph:
    """Files of one exported graph; ``probe`` is ``file`` with the check outputs and lives only during the export."""

    file: Path
    probe: Path


def onnx_from_visual_graph(module: VisualGraph, inputs: GraphInputs, file: Path) -> ExportedGraph:
    """Write ``file`` (weights in ``file.data``) and its probe beside it.

    Sizes and budget are dynamic as ``inputs.spec`` says; opset 20, because JetPack 6's TensorRT reads it.

    Raises:
        ExportError: if torch cannot trace or translate the module.
    """
    probes = [name for name in ENCODER_OUTPUTS if name != "saliency" or module.encoder.needs_saliency]
    model = _translate(module, inputs, [*VISUAL_OUTPUTS, *probes])
    probe = file.with_name(f"{file.stem}.probe.onnx")
    ir.save(model, probe, external_data=f"{file.name}.data", size_threshold_bytes=1024)
    for weight in model.graph.initializers.values():
        # onnxscript's rewrite rules, which live as long as the process, remember the last graph that they matched.
        weight.const_value = None
    _save_part(probe, file, [tensor.name for tensor in inputs.spec.inputs], VISUAL_OUTPUTS)
    return ExportedGraph(file, probe)


def onnx_from_selector(module: SelectorGraph, inputs: GraphInputs, file: Path) -> None:
    """Write ``file``: a selector alone, which has no weights.

    Raises:
        ExportError: if torch cannot trace or translate the module.
    """
    ir.save(_translate(module, inputs, VISUAL_OUTPUTS), file)


def encoder_from_probe(graph: ExportedGraph, spec: GraphSpec, file: Path) -> None:
    """Write ``file``, the fused graph up to what the selector takes; its weights stay those of the fused graph's file.

    What the probe shows as float32 leaves the encoder in the graph's own dtype.
    """
    values = ir.convenience.create_value_mapping(ir.load(graph.probe).graph)
    cut: list[str] = []
    for name in ENCODER_OUTPUTS:
        producer = values[name].producer()
        while producer is not None and producer.op_type == "Identity":  # what is feature and token at once
            producer = None if producer.inputs[0] is None else producer.inputs[0].producer()
        before = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        is_half = before is not None and before.dtype == ir.DataType.FLOAT16
        cut.append(str(before.name) if before is not None and is_half else name)
    _save_part(graph.probe, file, spec.vision_inputs, cut, spec)


def _save_part(
    whole: Path, file: Path, inputs: Sequence[str], outputs: Sequence[str], spec: GraphSpec | None = None
) -> None:
    """Write what ``outputs`` need of ``whole``, named and shaped as in ``spec`` where one is given."""
    model = ir.load(whole)
    part = ir.convenience.extract(model.graph, inputs, outputs)
    # extract() goes through sets; the order of the whole gives the same bytes every time.
    kept = [part.initializers.pop(name) for name in model.graph.initializers if name in part.initializers]
    for initializer in kept:
        part.initializers.add(initializer)
    model.graph = part
    for place, value in enumerate(part.outputs):
        if value in part.outputs[:place]:
            again = ir.node("Identity", [value])
            again.outputs[0].type = value.type
            part.append(again)
            part.outputs[place] = again.outputs[0]
    for value, tensor in zip(model.graph.outputs, spec.outputs if spec else (), strict=False):
        value.name, value.shape = tensor.name, ir.Shape(tensor.shape)
    ir.save(model, file)


def _translate(module: nn.Module, inputs: GraphInputs, outputs: Sequence[str]) -> ir.Model:
    """Return ``module`` as ONNX, with the names and shapes of ``inputs.spec`` and nothing of the exporting machine."""
    model = _export(module, inputs)
    if any(dim.name == "visual" for dim in inputs.spec.dims):
        sort_in_fixed_length(model.graph, inputs.spec.dim("visual").max)
    for value in model.graph.all_nodes():
        # Stack traces and scopes of the exporting machine: no use to a device, and different on every machine.
        value.metadata_props.clear()
        value.doc_string = None
    for tensor in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        tensor.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "flashvlm-export", ""
    for output, name in zip(model.graph.outputs, outputs, strict=True):
        output.name = name
    rows = {given: spec.shape[:1] for given, spec in zip(model.graph.inputs, inputs.spec.inputs, strict=True)}
    for node in model.graph:
        # The exporter reads the batch size off any input; off the first that has it, the encoder needs no text.
        asked = node.inputs[0] if node.op_type == "Shape" and node.attributes.get_int("end", 0) == 1 else None
        if asked in rows:
            node.replace_input_with(0, next(given for given in rows if rows[given] == rows[asked]))
    specs = {spec.name: spec for spec in (*inputs.spec.inputs, *inputs.spec.outputs)}
    for output in (*model.graph.inputs, *model.graph.outputs):
        if output.name in specs:
            output.shape = ir.Shape(specs[output.name].shape)
    return model


def _export(module: nn.Module, inputs: GraphInputs) -> ir.Model:
    # Without torchvision, torch says of each of its operators that it is skipped.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    dims = {dim.name: torch.export.Dim(dim.name, min=dim.min, max=1 << 20) for dim in inputs.spec.dims}
    shapes = tuple(
        {axis: dims[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)} or None
        for tensor in inputs.spec.inputs
    )
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Two inputs share an axis on purpose; torch says so each time. The pytree warning is torch's own use.
            warnings.filterwarnings("ignore", message=".*shares the same shape constraints.*")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch|copyreg")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|copyreg|onnxscript")
            program = torch.export.export(module, inputs.tensors, dynamic_shapes=(shapes,), strict=True)
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in inputs.spec.inputs],
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:  # tracing and translation raise anything
        interrupts.check()
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise ExportError(
            "torch could not turn the visual graph into ONNX",
            received=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a module that torch.export traces and torch.onnx translates",
            hint="the cause is chained to this error; check the versions against constraints.txt",
        ) from error
    interrupts.check()
    model: ir.Model = exported.model
    return model


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C began it, where this is a library and Python's own handler raised it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
