"""The check of encoder and selectors refuses halves that are not the fused graph's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import helper

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import ExportError
from flashvlm_export.evaluation.evaluate import bundle_sha256
from flashvlm_export.export.checkpoint import Checkpoint
from flashvlm_export.export.checks import SelectorCase, SplitReport, check_split
from flashvlm_export.export.onnx_graph import ExportedGraph
from flashvlm_export.models import adapter_class
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import ENCODER_OUTPUTS, Precision


class Halves:
    """A copy of the tiny bundle whose files may be spoilt, with the fused graph's probe written again."""

    def __init__(self, checkpoint: Path, folder: Path, precision: Precision) -> None:
        weights = Checkpoint(checkpoint, adapter_class("llava").canonical)
        self.adapter = adapter_class("llava")(weights.config)
        self.precision = precision
        fused = folder / f"visual.{precision.value}.onnx"
        self.graph = ExportedGraph(fused, fused.with_suffix(".probe.onnx"))
        model = onnx.load(fused, load_external_data=False)
        for name in ENCODER_OUTPUTS:
            model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        onnx.save(model, self.graph.probe)
        halves = Bundle.open(folder).split_graphs(precision)
        self.encoder = folder / halves.encoder.file
        self.selectors = {name: folder / entry.file for name, entry in halves.selectors.items()}

    def check(self, files: dict[str, Path] | None = None) -> SplitReport:
        """Check, with ``files`` standing for the selectors of these names."""
        cases = [
            SelectorCase(file, get_selector(name).make_config({})) for name, file in (files or self.selectors).items()
        ]
        return check_split(self.graph, self.encoder, cases, self.adapter, self.precision, lambda text: None)


@pytest.fixture(params=[Precision.FP32, Precision.FP16])
def halves(request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> Halves:
    return Halves(tiny_checkpoint, shutil.copytree(tiny_bundle, tmp_path / "bundle"), request.param)


def spoil(file: Path, output: str, operator: str) -> None:
    """Put one more operator behind an output."""
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = "before" if name == output else name
    model.graph.node.append(helper.make_node(operator, ["before"], [output]))
    onnx.save(model, file)


def test_what_was_exported_passes(halves: Halves) -> None:
    report = halves.check()
    assert report.exact_rows + report.tied_rows == 3 * 7  # three selectors, seven images
    assert report.tied_rows <= 3
    assert report.encoder_difference <= (0 if halves.precision is Precision.FP32 else 1e-2)


@pytest.mark.parametrize("output", ENCODER_OUTPUTS)
def test_another_encoder_is_refused(halves: Halves, output: str) -> None:
    spoil(halves.encoder, output, "Neg")
    with pytest.raises(ExportError, match=f"'{output}' of the encoder alone differs"):
        halves.check()


def test_other_tokens_are_refused(halves: Halves) -> None:
    spoil(halves.selectors["divprune"], "visual_tokens", "Neg")
    with pytest.raises(ExportError, match="its tokens are not the rows"):
        halves.check()


def test_another_choice_is_refused(halves: Halves) -> None:
    with pytest.raises(ExportError, match="keeps other visual tokens than the selection algorithm"):
        halves.check({"flashvlm": halves.selectors["flashvlm"], "cdpruner": halves.selectors["divprune"]})


@pytest.mark.parametrize("halves", [Precision.FP32], indirect=True)  # only float32 promises the same bits
def test_another_score_than_the_fused_graphs_is_refused(halves: Halves) -> None:
    spoil(halves.selectors["flashvlm"], "scores", "Neg")
    with pytest.raises(ExportError, match="'scores' of encoder and selector differs from the fused graph"):
        halves.check()


def test_a_file_that_is_no_graph_is_refused(halves: Halves) -> None:
    spoil(halves.selectors["divprune"], "scores", "NoSuchOperator")
    with pytest.raises(ExportError, match="the ONNX checker rejects the exported graph"):
        halves.check()


def test_the_hash_of_answers_covers_what_gives_them(tiny_bundle: Path, tmp_path: Path) -> None:
    """Encoder, selector, weights: each changes it; the fused graph, another precision and other selectors do not."""
    bundle = Bundle.open(tiny_bundle)

    def digest(*changed: str) -> str:
        files = {
            name: replace(entry, sha256="0" * 64) if name in changed else entry
            for name, entry in bundle.manifest.files.items()
        }
        other = Bundle(bundle.path, replace(bundle.manifest, files=files))
        return bundle_sha256(other, Precision.FP32, selector="divprune")

    same = digest()
    assert same != bundle_sha256(bundle, Precision.FP32)
    assert same != bundle_sha256(bundle, Precision.FP32, selector="cdpruner")
    taking_part = {
        "encoder.fp32.onnx",
        "selector.divprune.fp32.onnx",
        "visual.fp32.onnx.data",
        "text_embeddings.npy",
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor.json",
        *(name for name in bundle.manifest.files if name.startswith("llm/")),
    }
    assert {name for name in bundle.manifest.files if digest(name) != same} == taking_part
    fused = bundle_sha256(bundle, Precision.FP32)
    without = replace(bundle.manifest, split={})
    alone = {name: entry for name, entry in without.files.items() if not name.startswith(("encoder.", "selector."))}
    assert bundle_sha256(Bundle(bundle.path, replace(without, files=alone)), Precision.FP32) == fused
