"""Exports that have to fail: the checks of the graph can, and whatever stops an export, the old bundle stays whole.

torch → ONNX takes ten seconds even for a tiny model, so the exports in here replay the graph of ``tiny_bundle``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from helpers.fake_bundle import make_fake_bundle
from onnx import helper, numpy_helper

from flashvlm_export import interrupts
from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DependencyError,
    ExportError,
    FlashVLMError,
    StorageError,
)
from flashvlm_export.export import bundle_from_checkpoint as module_under_test
from flashvlm_export.export import checks, decoder, engine_check, onnx_graph
from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint
from flashvlm_export.export.checkpoint import Checkpoint
from flashvlm_export.export.checks import CheckCase, CheckReport, check_graph
from flashvlm_export.export.child import ChildResult
from flashvlm_export.export.engine_from_onnx import engine_from_onnx
from flashvlm_export.export.onnx_graph import ExportedGraph
from flashvlm_export.export.visual_graph import VisualGraph, build_visual_graph
from flashvlm_export.files import atomic_directory, bundle_lock
from flashvlm_export.models import adapter_class
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.progress import Progress
from flashvlm_export.selection import FlashVLMConfig, get_selector
from flashvlm_export.specs import ENCODER_OUTPUTS, GraphSpec, Precision

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Exported:
    """The tiny model's graph in one precision, once as torch module and once as files."""

    precision: Precision
    adapter: Adapter
    module: VisualGraph
    graph: ExportedGraph
    spec: GraphSpec

    def copy(self, directory: Path) -> Exported:
        shutil.copytree(self.graph.file.parent, directory)
        graph = ExportedGraph(directory / self.graph.file.name, directory / self.graph.probe.name)
        return replace(self, graph=graph)

    def check(self, config: FlashVLMConfig | None = None) -> CheckReport:
        reference = copy.deepcopy(self.module)
        return check_graph(
            self.graph, self.adapter, reference, config or FlashVLMConfig(), self.precision, lambda text: None
        )

    @property
    def data(self) -> Path:
        return self.graph.file.with_name(f"{self.graph.file.name}.data")


def read_exported(checkpoint: Path, bundle: Path, precision: Precision, directory: Path) -> Exported:
    """Copy a graph out of ``bundle``, and write its probe again: the same graph with more outputs."""
    adapter_type = adapter_class("llava")
    weights = Checkpoint(checkpoint, adapter_type.canonical)
    adapter = adapter_type(weights.config)
    module = build_visual_graph(adapter, weights, get_selector("flashvlm"), FlashVLMConfig(), precision)
    file = directory / f"visual.{precision.value}.onnx"
    for name in (file.name, f"{file.name}.data"):
        shutil.copy(bundle / name, directory / name)
    model = onnx.load(file, load_external_data=False)
    for name in ENCODER_OUTPUTS:
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, file.with_suffix(".probe.onnx"))
    inputs = adapter.inputs(precision, batch=2, text=9, budget=5)
    return Exported(
        precision, adapter, module.float(), ExportedGraph(file, file.with_suffix(".probe.onnx")), inputs.spec
    )


@pytest.fixture(scope="module")
def both(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Exported]:
    if "FLASHVLM_TEST_BUNDLE" in os.environ:
        pytest.skip("the bundle given was exported from another checkpoint")
    return {
        precision: read_exported(tiny_checkpoint, tiny_bundle, precision, tmp_path_factory.mktemp("graph"))
        for precision in (Precision.FP32, Precision.FP16)
    }


@pytest.fixture(scope="module")
def pristine(both: dict[Precision, Exported]) -> Exported:
    return both[Precision.FP32]


@pytest.fixture
def half(both: dict[Precision, Exported], tmp_path: Path) -> Exported:
    """A copy of the exported fp16 graph to be spoilt."""
    return both[Precision.FP16].copy(tmp_path / "half")


@pytest.fixture
def exported(pristine: Exported, tmp_path: Path) -> Exported:
    """A copy of the exported fp32 graph to be spoilt."""
    return pristine.copy(tmp_path / "graph")


def producer(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if tensor in node.output)


def change_value(file: Path, find: Callable[[onnx.ModelProto], str], operator: str, constant: Any) -> None:
    """Put ``operator(constant, value)`` behind the value that ``find`` names, for all that read it."""
    model = onnx.load(file, load_external_data=False)
    name = find(model)
    node = producer(model, name)
    node.output[list(node.output).index(name)] = f"{name}.original"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(constant), f"{name}.constant"))
    position = list(model.graph.node).index(node) + 1
    model.graph.node.insert(
        position, helper.make_node(operator, [f"{name}.constant", f"{name}.original"], [name], name=f"{name}.changed")
    )
    onnx.save(model, file)


def named(name: str) -> Callable[[onnx.ModelProto], str]:
    return lambda model: name


def kept_mask(model: onnx.ModelProto) -> str:
    """The 0-or-1 value that is sorted to give ``visual_indices``."""
    cut = producer(model, "visual_indices")
    sort = producer(model, cut.input[0])
    assert (cut.op_type, sort.op_type) == ("Slice", "TopK")
    return str(sort.input[0])


def weight_in(exported: Exported, shape: tuple[int, ...], position: int = 0) -> np.memmap[Any, Any]:
    """A writable view of one weight in the file that both graphs share."""
    model = onnx.load(exported.graph.probe, load_external_data=False)
    tensors = [t for t in model.graph.initializer if t.external_data and tuple(t.dims) == shape]
    place = {entry.key: entry.value for entry in tensors[position].external_data}
    dtype = exported.precision.float_dtype
    return np.memmap(exported.data, dtype, "r+", int(place.get("offset", 0)), shape)


class TestCheckGraph:
    def test_the_graph_as_exported_passes(self, exported: Exported) -> None:
        report = exported.check()
        # Batches of 1, 2, 1 and 3 images.
        assert (report.cases, report.exact_rows + report.tied_rows) == (4, 7)
        # float32 sums in another order; a wrong operator is off by far more.
        assert report.encoder_error < 1e-4
        assert report.shipped_overlap == 1.0

    def test_the_half_precision_graph_passes(self, half: Exported) -> None:
        report = half.check()
        assert report.exact_rows + report.tied_rows == 7
        # float16 has 2^-11 = 5e-4 per operation; zero would mean that the graph is not in float16.
        assert 1e-5 < report.encoder_error < 2e-2

    def test_the_half_precision_graph_can_fail(self, half: Exported) -> None:
        weight_in(half, (64, 64))[...] = 0
        with pytest.raises(ExportError, match="'projected_tokens' of the fp16 graph differs from torch") as caught:
            half.check()
        assert caught.value.expected == "at most 5e-02"

    def test_the_half_precision_graph_can_keep_other_tokens(self, half: Exported) -> None:
        for file in (half.graph.file, half.graph.probe):
            change_value(file, kept_mask, "Sub", np.float32(1))
        with pytest.raises(ExportError, match="keeps other visual tokens"):
            half.check()

    def test_half_precision_tokens_that_are_not_the_rows_kept(self, half: Exported) -> None:
        for file in (half.graph.file, half.graph.probe):
            change_value(file, named("visual_tokens"), "Mul", np.float16(1.05))
        with pytest.raises(ExportError, match="'visual_tokens' are not the rows"):
            half.check()

    @pytest.mark.parametrize(("shared", "passes"), [(8, True), (4, True), (3, False), (0, False)])
    def test_half_of_the_kept_tokens_may_hang_on_rounding(self, shared: int, passes: bool) -> None:
        case = CheckCase(batch=1, text=1, budget=8)
        tokens = np.arange(16, dtype=np.float32)[None, :, None]
        scores = np.linspace(0, 1, 16, dtype=np.float32)[None]
        first = np.arange(8)[None]
        second = np.sort(np.r_[np.arange(shared), np.arange(8, 16 - shared)])[None]
        probe = {"projected_tokens": tokens, "visual_indices": first, "scores": scores}
        ship = {"visual_tokens": tokens[:, second[0]], "visual_indices": second, "scores": scores}
        scored = FlashVLMConfig().important_tokens(case.budget)
        with contextlib.nullcontext() if passes else pytest.raises(ExportError, match="selects otherwise"):
            assert checks._shipped_overlap(case, probe, ship, Precision.FP16, scored) == shared / 8

    @pytest.mark.parametrize(
        ("find", "operator", "constant"),
        [(kept_mask, "Sub", np.float32(1)), (named("scores"), "Mul", np.float32(0.9))],
        ids=["the dropped ones instead", "other scores"],
    )
    def test_a_half_precision_graph_that_selects_otherwise_than_its_probe(
        self, half: Exported, find: Callable[[onnx.ModelProto], str], operator: str, constant: Any
    ) -> None:
        change_value(half.graph.file, find, operator, constant)
        with pytest.raises(ExportError, match="the shipped fp16 graph selects otherwise than its probe"):
            half.check()

    @pytest.mark.parametrize(
        ("shape", "output"),
        [
            ((32, 3, 14, 14), "patch_features"),
            ((32, 32), "patch_features"),
            ((64, 32), "patch_features"),
            ((64, 64), "projected_tokens"),
        ],
        ids=["patch embedding", "attention", "MLP", "projector"],
    )
    @pytest.mark.parametrize("damage", ["zeroed", "scaled by 1.05", "shuffled", "one NaN", "one infinity"])
    def test_a_wrong_weight_is_an_encoder_error(
        self, exported: Exported, shape: tuple[int, ...], output: str, damage: str
    ) -> None:
        weight = weight_in(exported, shape)
        if damage == "zeroed":
            weight[...] = 0
        elif damage == "scaled by 1.05":
            weight *= np.float32(1.05)
        elif damage == "shuffled":
            weight[...] = np.random.default_rng(0).permutation(weight.ravel()).reshape(shape)
        else:
            weight.ravel()[7] = np.nan if damage == "one NaN" else np.inf
        weight.flush()
        with pytest.raises(ExportError, match=f"'{output}' of the fp32 graph differs from torch") as caught:
            exported.check()
        assert "largest error" in str(caught.value.received)
        assert caught.value.expected == "at most 1e-03"
        assert "CheckCase(batch=1, text=23, budget=4)" in caught.value.what

    def test_saliency_is_checked_too(self, exported: Exported) -> None:
        change_value(exported.graph.probe, named("saliency"), "Mul", np.float32(1.01))
        with pytest.raises(ExportError, match="'saliency' of the fp32 graph differs from torch"):
            exported.check()

    @pytest.mark.parametrize(
        ("find", "operator", "constant"),
        [
            (kept_mask, "Sub", np.float32(1)),
            (named("visual_indices"), "Sub", np.int64(15)),
            (named("scores"), "Sub", np.float32(1)),
        ],
        ids=["the dropped ones instead", "mirrored", "worst first"],
    )
    def test_other_tokens_kept_is_a_selection_error(
        self, exported: Exported, find: Callable[[onnx.ModelProto], str], operator: str, constant: Any
    ) -> None:
        for file in (exported.graph.file, exported.graph.probe):
            change_value(file, find, operator, constant)
        with pytest.raises(ExportError, match="keeps other visual tokens than the selection algorithm") as caught:
            exported.check()
        assert "indices agree" in str(caught.value.received)
        assert "image 0" in caught.value.what

    @pytest.mark.parametrize(
        "config",
        [FlashVLMConfig(eta=0.0), FlashVLMConfig(important_ratio=1.0), FlashVLMConfig(diversity="farthest")],
        ids=["eta", "important_ratio", "diversity"],
    )
    def test_other_settings_than_the_manifest_says_is_a_selection_error(
        self, exported: Exported, config: FlashVLMConfig
    ) -> None:
        with pytest.raises(ExportError, match="keeps other visual tokens"):
            exported.check(config)

    @pytest.mark.parametrize(
        ("output", "files", "problem"),
        [
            ("visual_tokens", ["file", "probe"], "'visual_tokens' are not the rows that 'visual_indices' names"),
            ("visual_tokens", ["file"], "'visual_tokens' are not the rows that 'visual_indices' names"),
            ("scores", ["file"], "the shipped graph and its probe disagree on 'scores'"),
        ],
    )
    def test_outputs_that_do_not_belong_together(
        self, exported: Exported, output: str, files: list[str], problem: str
    ) -> None:
        for file in files:
            # The smallest step that float32 has at one: the comparison is exact.
            change_value(getattr(exported.graph, file), named(output), "Mul", np.float32(1 + 2**-23))
        with pytest.raises(ExportError, match=problem):
            exported.check()

    def test_an_unknown_operator(self, exported: Exported) -> None:
        model = onnx.load(exported.graph.file, load_external_data=False)
        producer(model, "scores").op_type = "NoSuchOperator"
        onnx.save(model, exported.graph.file)
        with pytest.raises(ExportError, match="the ONNX checker rejects the exported graph") as caught:
            exported.check()
        assert "NoSuchOperator" in str(caught.value.received)

    def test_a_wrong_declared_shape(self, exported: Exported) -> None:
        model = onnx.load(exported.graph.file, load_external_data=False)
        scores = next(output for output in model.graph.output if output.name == "scores")
        scores.type.tensor_type.elem_type = onnx.TensorProto.INT64
        onnx.save(model, exported.graph.file)
        with pytest.raises(ExportError, match="shape inference fails") as caught:
            exported.check()
        assert "(7) vs (1)" in str(caught.value.received)  # int64 declared, float32 inferred

    @pytest.mark.parametrize("keep", [0.0, 0.5, None], ids=["empty", "half", "missing"])
    def test_damaged_external_data(self, exported: Exported, keep: float | None) -> None:
        content = exported.data.read_bytes()
        exported.data.unlink()
        if keep is not None:
            exported.data.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(ExportError) as caught:
            exported.check()
        assert "ternal" in str(caught.value.received)  # external data, initializer or file, as each library calls it
        assert "visual.fp32" in str(caught.value.received)


def compile_graph(file: Path, spec: GraphSpec) -> None:
    engine_from_onnx(file, spec, "tensorrt-rtx", io.BytesIO(), profiles=[spec.dims], capabilities=[(8, 6)])


class TestTensorRTRTX:
    @pytest.fixture(autouse=True)
    def _needs_rtx(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="the engine check needs TensorRT-RTX")

    def test_the_exported_graph_compiles(self, exported: Exported) -> None:
        measured = engine_check.check_engine_builds(exported.graph.file, exported.spec)
        assert measured["engine_size_bytes"] > exported.data.stat().st_size / 2

    @pytest.mark.parametrize("operator", ["Det", "Unique"])
    def test_an_operator_it_does_not_know(self, exported: Exported, operator: str) -> None:
        """Both are plain ONNX, so the checker and ONNX Runtime take them."""
        model = onnx.load(exported.graph.file, load_external_data=False)
        model.graph.node.append(helper.make_node(operator, ["pixel_values"], [f"{operator}.output"]))
        kind = model.graph.output.add()
        kind.CopyFrom(helper.make_tensor_value_info(f"{operator}.output", onnx.TensorProto.FLOAT, None))
        onnx.save(model, exported.graph.file)
        with pytest.raises(ExportError, match=r"cannot parse visual\.fp32\.onnx") as caught:
            compile_graph(exported.graph.file, exported.spec)
        assert operator in str(caught.value.received)

    def test_a_profile_that_does_not_fit(self, exported: Exported) -> None:
        pixels, *others = exported.spec.inputs
        spec = replace(exported.spec, inputs=(replace(pixels, shape=("batch", 3, 84, 84)), *others))
        with pytest.raises(ExportError, match=r"cannot compile visual\.fp32\.onnx") as caught:
            compile_graph(exported.graph.file, spec)
        assert "pixel_values" in str(caught.value.received)

    def test_a_compiler_that_is_killed_is_not_the_graphs_fault(
        self, exported: Exported, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_check, "run_child", lambda *_: ChildResult(-signal.SIGKILL, ["half-way"]))
        with pytest.raises(ExportError) as caught:
            engine_check.check_engine_builds(exported.graph.file, exported.spec)
        assert "killed by SIGKILL" in str(caught.value.received)
        assert "free some memory" in str(caught.value.hint)

    def test_a_file_that_is_no_graph(self, exported: Exported) -> None:
        exported.graph.file.write_bytes(b"not a graph")
        with pytest.raises(ExportError, match=r"does not compile with TensorRT-RTX: visual\.fp32\.onnx") as caught:
            engine_check.check_engine_builds(exported.graph.file, exported.spec)
        assert "cannot parse visual.fp32.onnx" in str(caught.value.received)


class TestWithoutTensorRTRTX:
    @pytest.fixture(autouse=True)
    def _no_rtx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # As find_spec and import see a package that is not there.
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        monkeypatch.setattr(module_under_test, "is_installed", lambda backend: False)

    def test_required_is_refused_before_anything_is_read(self, tmp_path: Path) -> None:
        settings = ExportSettings(str(tmp_path / "missing"), tmp_path / "out", engine_check="required")
        with pytest.raises(DependencyError, match="needs TensorRT-RTX") as caught:
            bundle_from_checkpoint(settings)
        assert "pip install" in str(caught.value.hint)

    def test_compiling_is_refused(self, tmp_path: Path, pristine: Exported) -> None:
        with pytest.raises(DependencyError, match="tensorrt-rtx cannot be loaded"):
            compile_graph(pristine.graph.file, pristine.spec)

    def test_auto_exports_without_the_check(self, export: Export) -> None:
        bundle = export(engine_check="auto")
        assert set(bundle.manifest.checks["fp32"]) == {"parity"}


class Steps(Progress):
    """Calls ``at`` before each step."""

    def __init__(self, at: Callable[[str], None]) -> None:
        super().__init__()
        self._at = at
        self.notes: list[str] = []

    def step(self, text: str) -> None:
        self._at(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Export:
    """Exports ``checkpoint`` to ``output`` in fp32, replaying torch → ONNX."""

    checkpoint: Path
    output: Path

    def __call__(self, progress: Progress | None = None, **changes: Any) -> Bundle:
        settings = ExportSettings(
            model=str(self.checkpoint),
            output=self.output,
            precisions=[Precision.FP32],
            decoder="none",
            engine_check="off",
        )
        return bundle_from_checkpoint(replace(settings, **changes), progress)

    def fails(self, error: type[FlashVLMError], what: str, progress: Progress | None = None, **changes: Any) -> str:
        """Export; return the message, having seen that nothing was changed on disk."""
        before = self.on_disk()
        with pytest.raises(error, match=what) as caught:
            self(progress, **changes)
        assert self.on_disk() == before
        return str(caught.value)

    def on_disk(self) -> dict[str, bytes]:
        folder = self.output.parent
        return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in sorted(folder.rglob("*"))}


@pytest.fixture
def export(tiny_checkpoint: Path, pristine: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    monkeypatch.setattr(onnx_graph, "_translate", lambda module, inputs, outputs: onnx_ir.load(pristine.graph.probe))
    (tmp_path / "out").mkdir()
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    return Export(checkpoint, tmp_path / "out" / "bundle")


@pytest.fixture
def old(export: Export) -> Bundle:
    return make_fake_bundle(export.output)


class TestWholeExport:
    def test_the_bundle_holds_what_the_manifest_says_and_nothing_else(self, export: Export) -> None:
        bundle = Bundle.open(export().path, verify=True)
        on_disk = {str(f.relative_to(bundle.path)) for f in bundle.path.rglob("*") if f.is_file()}
        assert on_disk == {*bundle.manifest.files, "manifest.json"}
        assert on_disk == {
            "manifest.json",
            "visual.fp32.onnx",
            "visual.fp32.onnx.data",
            "text_embeddings.npy",
            "tokenizer.json",
            "chat_template.jinja",
            "preprocessor.json",
        }
        assert list(export.output.parent.iterdir()) == [export.output]

    def test_exporting_twice_gives_the_same_bytes(self, export: Export, tmp_path: Path) -> None:
        first = export().manifest
        again = export(output=tmp_path / "again").manifest
        assert first.files == again.files
        assert first.source == again.source

    def test_the_fingerprint_does_not_depend_on_precisions_and_decoder(self, export: Export, tiny_bundle: Path) -> None:
        full = Bundle.open(tiny_bundle, verify=True).manifest
        assert full.decoder is not None
        assert set(full.graphs) == {"fp32", "fp16"}
        small = export().manifest
        assert small.source.weights_sha256 == full.source.weights_sha256
        assert small.source.config_sha256 == full.source.config_sha256

    def test_every_graph_was_checked(self, tiny_bundle: Path) -> None:
        manifest = Bundle.open(tiny_bundle).manifest
        assert set(manifest.checks) == set(manifest.graphs)
        for measured in manifest.checks.values():
            assert measured["parity"]["cases"] == 4
            assert measured["parity"]["exact_rows"] + measured["parity"]["tied_rows"] == 7


class TestOutputPath:
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("taken_by", ["a file", "a directory with a file", "a directory with another manifest"])
    def test_what_is_not_a_bundle_is_never_replaced(self, export: Export, taken_by: str, overwrite: bool) -> None:
        if taken_by == "a file":
            export.output.write_text("precious")
        else:
            export.output.mkdir()
            (export.output / "thesis").mkdir()
            name = "thesis.tex" if "a file" in taken_by else "manifest.json"
            (export.output / name).write_text("precious")
        message = export.fails(StorageError, "the output path is taken", overwrite=overwrite)
        assert f"{export.output} (not a bundle)" in message
        assert "a new path, an empty directory, or a bundle together with --overwrite" in message

    def test_a_bundle_is_replaced_only_when_asked(self, export: Export, old: Bundle) -> None:
        message = export.fails(StorageError, "the output path is taken")
        assert f"{export.output} (a bundle)" in message
        assert "--overwrite" in message
        assert export(overwrite=True).manifest.source.model == str(export.checkpoint)
        assert list(export.output.parent.iterdir()) == [export.output]

    def test_a_bundle_that_is_being_written_to_is_not_replaced(self, export: Export, old: Bundle) -> None:
        with bundle_lock(old.path):
            export.fails(BundleError, "another process is writing to this bundle", overwrite=True)
        export(overwrite=True)

    @pytest.mark.parametrize("damage", ["manifest", "graph"])
    def test_a_damaged_bundle_can_be_replaced(self, export: Export, old: Bundle, damage: str) -> None:
        if damage == "manifest":
            (old.path / "manifest.json").write_text("{")
        else:
            for graph in old.path.glob("visual.*"):
                graph.unlink()
        export(overwrite=True)

    def test_an_empty_directory_is_taken(self, export: Export) -> None:
        export.output.mkdir()
        assert export().path == export.output

    @pytest.mark.parametrize("place", ["{file}/bundle", "{folder}/" + "n" * 300])
    def test_a_path_that_cannot_be_written_is_refused_before_the_work(self, export: Export, place: str) -> None:
        output = place.format(file=export.checkpoint / "config.json", folder=export.output.parent)

        def at(step: str) -> None:
            assert step.startswith("exporting "), "the work began"

        message = export.fails(StorageError, "cannot be written", Steps(at), output=Path(output))
        assert "a directory that you may write to" in message


class TestInterrupted:
    STEPS = (
        "text embeddings",
        "tokenizer",
        "visual graph fp32: weights",
        "visual graph fp32: torch",
        "visual graph fp32: ONNX checker",
        "visual graph fp32: graph outputs",
        "hashes and manifest",
    )

    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_at_any_step_the_old_bundle_stays(
        self, export: Export, old: Bundle, step: str, error: type[BaseException]
    ) -> None:
        def at(text: str) -> None:
            if text.startswith(step):
                raise error

        before = export.on_disk()
        with pytest.raises(error):
            export(Steps(at), overwrite=True)
        assert export.on_disk() == before
        assert Bundle.open(export.output, verify=True).manifest == old.manifest

    def test_without_an_old_bundle_nothing_is_left(self, export: Export) -> None:
        def at(text: str) -> None:
            if text == self.STEPS[-1]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(Steps(at))
        assert export.on_disk() == {}


class TestFailedCheck:
    def test_a_graph_that_fails_its_check_leaves_the_old_bundle(
        self, export: Export, old: Bundle, pristine: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        spoilt = pristine.copy(tmp_path / "spoilt")
        weight_in(spoilt, (64, 64))[...] = 0
        monkeypatch.setattr(onnx_graph, "_translate", lambda module, inputs, outputs: onnx_ir.load(spoilt.graph.probe))
        message = export.fails(ExportError, "'projected_tokens' of the fp32 graph differs", overwrite=True)
        assert "no bundle was written" in message

    def test_torch_that_cannot_trace_leaves_the_old_bundle(
        self, export: Export, old: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()  # the real translation, with a torch that fails at once

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("unsupported: first line\nsecond line")

        monkeypatch.setattr(torch.export, "export", fail)
        message = export.fails(ExportError, "torch could not turn the visual graph into ONNX", overwrite=True)
        assert "received: RuntimeError: unsupported: first line\n" in message
        assert "second line" not in message

    @pytest.mark.parametrize("becomes", ["another error", "nothing"])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupt_that_torch_swallows_still_ends_the_export(
        self, export: Export, old: Bundle, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, becomes: str
    ) -> None:
        """Both were seen with torch 2.13, when it came while dynamo had its modes off the stack."""
        monkeypatch.undo()
        monkeypatch.setattr(interrupts, "_interrupted", False)

        def swallow(*_: Any, **__: Any) -> None:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(60)
            if becomes == "another error":
                raise RuntimeError("trying to pop from empty mode stack")

        monkeypatch.setattr(torch.export, "export", swallow)
        monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
        before = export.on_disk()
        handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            interrupts.install()
            with pytest.raises(KeyboardInterrupt):
                export(overwrite=True)
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)
        assert export.on_disk() == before

    def test_an_engine_that_does_not_compile_leaves_the_old_bundle(
        self, export: Export, old: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("tensorrt_rtx", reason="the engine check needs TensorRT-RTX")

        def fail(file: Path, spec: GraphSpec) -> dict[str, float]:
            raise ExportError(f"TensorRT-RTX cannot parse {file.name}")

        monkeypatch.setattr(module_under_test, "check_engine_builds", fail)
        export.fails(ExportError, "cannot parse", overwrite=True, engine_check="required")


class TestFullDisk:
    def test_too_little_space_is_told_before_the_work(self, export: Export, small_disk: Path) -> None:
        export.output = small_disk / "bundle"
        message = export.fails(StorageError, "not enough disk space")
        assert f"GB free at {small_disk}" in message
        # 32 MiB for small files, and little else for so small a model.
        assert "about 0.03 GB" in message

    def test_a_disk_that_fills_up_meanwhile(
        self, export: Export, small_disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """256 KiB hold the old bundle and the embeddings, but not the weights of the graph as well."""
        monkeypatch.setattr(module_under_test, "require_free_space", lambda path, needed_bytes: None)
        export.output = small_disk / "bundle"
        old = make_fake_bundle(export.output)
        message = export.fails(StorageError, "the disk is full; nothing was changed", overwrite=True)
        assert str(export.output) in message
        assert Bundle.open(export.output, verify=True).manifest == old.manifest

    @pytest.mark.parametrize("step", TestInterrupted.STEPS)
    def test_at_any_step(self, export: Export, old: Bundle, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def at(text: str) -> None:
            if text.startswith(step):
                raise OSError(28, "No space left on device")

        export.fails(StorageError, "the disk is full; nothing was changed", Steps(at), overwrite=True)


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "error", "what"),
        [
            ({"precisions": []}, ConfigError, "no precision to export"),
            ({"precisions": [Precision.INT8]}, ConfigError, "not exported but calibrated"),
            ({"selector": "fastvlm"}, ConfigError, "unknown selector"),
            ({"selection": {"etta": 0.4}}, ConfigError, "no such setting"),
            ({"selection": {"eta": 1.5}}, ConfigError, "'eta' is out of range"),
            ({"selection": {"diversity": "best"}}, ConfigError, "diversity"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_wrong_settings_are_refused_before_anything_is_read(
        self, export: Export, changes: dict[str, Any], error: type[FlashVLMError], what: str
    ) -> None:
        shutil.rmtree(export.checkpoint)
        message = export.fails(error, what, **changes)
        assert "expected:" in message

    def test_a_decoder_that_cannot_be_exported_is_told_before_the_graph_is(self, export: Export) -> None:
        edit_json(export.checkpoint / "config.json", lambda c: c["text_config"].update(model_type="gpt_neox"))

        def at(step: str) -> None:
            assert step.startswith("exporting "), "the work began"

        export.fails(ExportError, "cannot be exported as an ONNX decoder", Steps(at), decoder="fp32")

    def test_a_missing_model_builder_is_told_before_the_graph_is(
        self, export: Export, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decoder.importlib.util, "find_spec", lambda name: None)
        message = export.fails(DependencyError, "model builder", decoder="fp32")
        assert "pip install '.[llm]'" in message


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


class TestProcessorFiles:
    """Tokenizer and image processor are read before the long work."""

    @staticmethod
    def at(step: str) -> None:
        assert "torch → ONNX" not in step, "the long work began"

    def fails(self, export: Export, what: str) -> str:
        return export.fails(CheckpointError, what, Steps(self.at))

    @pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": 7}'])
    def test_a_damaged_tokenizer(self, export: Export, content: str) -> None:
        (export.checkpoint / "tokenizer.json").write_text(content)
        message = self.fails(export, "the tokenizer cannot be read")
        assert str(export.checkpoint) in message
        assert "tokenizer.json" in message

    @pytest.mark.parametrize("image_token", [99_999, 5])
    def test_an_image_token_that_the_tokenizer_does_not_have(self, export: Export, image_token: int) -> None:
        """Id 5 is in the vocabulary, but it is not a token of its own that a prompt could hold."""
        edit_json(export.checkpoint / "config.json", lambda config: config.update(image_token_index=image_token))
        message = self.fails(export, "no token for the image placeholder")
        assert f"id {image_token}" in message
        assert "image_token_index" in message

    @pytest.mark.parametrize("eos", ["</s>", [], [2, "</s>"], True, 2.0])
    def test_an_end_of_answer_that_is_no_token_id(self, export: Export, eos: Any) -> None:
        edit_json(export.checkpoint / "generation_config.json", lambda config: config.update(eos_token_id=eos))
        message = self.fails(export, "which token ends an answer")
        assert f"eos_token_id {eos!r}" in message
        assert "generation_config.json or config.json" in message

    def test_no_end_of_answer(self, export: Export) -> None:
        (export.checkpoint / "generation_config.json").unlink()
        edit_json(export.checkpoint / "config.json", lambda config: config["text_config"].update(eos_token_id=None))
        edit_json(export.checkpoint / "tokenizer_config.json", lambda config: config.pop("eos_token"))
        assert "eos_token_id None" in self.fails(export, "which token ends an answer")

    @pytest.mark.parametrize("eos", [2, [2, 5]])
    def test_the_end_of_answer_is_that_of_the_generation_config(self, export: Export, eos: Any) -> None:
        edit_json(export.checkpoint / "generation_config.json", lambda config: config.update(eos_token_id=eos))
        prompt = export().manifest.prompt
        assert prompt is not None
        assert prompt.eos_token_ids == ([2] if eos == 2 else [2, 5])

    def test_no_image_processor(self, export: Export) -> None:
        (export.checkpoint / "preprocessor_config.json").unlink()
        message = self.fails(export, "no image processor")
        assert "preprocessor_config.json" in message
        assert "save_pretrained" in message

    @pytest.mark.parametrize("content", ["", "{", "nonsense", "\xff"])
    def test_a_damaged_image_processor(self, export: Export, content: str) -> None:
        (export.checkpoint / "preprocessor_config.json").write_text(content, encoding="latin-1")
        assert str(export.checkpoint) in self.fails(export, "preprocessor_config.json cannot be read")

    def test_images_of_another_size(self, export: Export) -> None:
        edit_json(
            export.checkpoint / "preprocessor_config.json",
            lambda config: config.update(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}),
        )
        message = self.fails(export, "image processor and vision tower do not belong together")
        assert "images of 84 x 84 pixels" in message
        assert "images of 56 x 56 pixels" in message

    def test_without_a_tokenizer_the_bundle_takes_no_questions_and_says_so(self, export: Export) -> None:
        (export.checkpoint / "tokenizer.json").unlink()
        steps = Steps(lambda step: None)
        bundle = export(steps)
        assert bundle.manifest.prompt is None
        assert "tokenizer.json" not in bundle.manifest.files
        assert any("no questions" in note for note in steps.notes)


@contextlib.contextmanager
def command_at_work(checkpoint: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A ``flashvlm export``; two precisions, so that there is time to stop it."""
    command = [sys.executable, "-m", "flashvlm_export", "export", str(checkpoint), "--output", str(output)]
    command += ["--overwrite", "--precision", "fp32,fp16", "--decoder", "none", "--engine-check", "off"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for(running: subprocess.Popen[str], step: str) -> None:
    assert running.stderr is not None
    seen = []
    for line in running.stderr:
        seen.append(line)
        if step in line:
            return
    pytest.fail("the command ended early:\n" + "".join(seen))


def test_a_command_killed_or_interrupted_at_work_leaves_the_old_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    killed_old = make_fake_bundle(tmp_path / "killed" / "bundle")
    interrupted_old = make_fake_bundle(tmp_path / "interrupted" / "bundle")
    # Both at once: most of their time is imports.
    with (
        command_at_work(tiny_checkpoint, killed_old.path) as killed,
        command_at_work(tiny_checkpoint, interrupted_old.path) as interrupted,
    ):
        wait_for(killed, "torch → ONNX")
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(300) == -signal.SIGKILL
        wait_for(interrupted, "torch → ONNX")
        interrupted.send_signal(signal.SIGTERM)  # ends as Ctrl-C does
        _, errors = interrupted.communicate(timeout=300)  # torch may swallow it until the graph is done

    assert interrupted.returncode == 130
    assert "interrupted; nothing half-written is left behind" in errors
    assert "Traceback" not in errors
    assert Bundle.open(interrupted_old.path, verify=True).manifest == interrupted_old.manifest
    assert list(interrupted_old.path.parent.iterdir()) == [interrupted_old.path]

    assert Bundle.open(killed_old.path, verify=True).manifest == killed_old.manifest
    assert len(list(killed_old.path.parent.iterdir())) == 2
    with pytest.raises(ZeroDivisionError), atomic_directory(killed_old.path):
        _ = 1 / 0
    assert Bundle.open(killed_old.path, verify=True).manifest == killed_old.manifest
    assert list(killed_old.path.parent.iterdir()) == [killed_old.path]
