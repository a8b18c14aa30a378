"""From a bundle with an fp16 graph to one with an INT8 graph as well."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx

from flashvlm_export.bundle import Bundle
from flashvlm_export.calibration import install
from flashvlm_export.calibration.checks import check_int8_file, shipped_readings, weight_bytes
from flashvlm_export.calibration.layers import Layer, find_layers, find_products
from flashvlm_export.calibration.likeness import Likeness, Tolerance, compare
from flashvlm_export.calibration.observers import Method, make_observer
from flashvlm_export.calibration.qdq import partly_quantised, qdq_from_fp16, save_graph
from flashvlm_export.calibration.ranges import (
    PARTIAL,
    Ranges,
    decode_ranges,
    observe_ranges,
    ranges_key,
)
from flashvlm_export.calibration.readings import load_structure, moved, readable_graph
from flashvlm_export.calibration.samples import Sample, split_samples, spread
from flashvlm_export.calibration.sensitivity import Sensitivity, analyse, most_runs
from flashvlm_export.errors import BundleError, ConfigError, UsageError
from flashvlm_export.files import bundle_lock, require_free_space, storage_errors
from flashvlm_export.manifest import GraphEntry
from flashvlm_export.progress import Progress
from flashvlm_export.records import encode_record
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import Precision, check_budget

#: Below the bundle while calibration runs; what is left of a killed run is resumed from it.
WORK = ".calibration"


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    Attributes:
        method: ``minmax``, ``entropy`` or ``percentile``.
        percentile: share of magnitudes that is not clipped, in percent; for that method only.
        tolerance: what the INT8 graph must keep; ``None`` measures without excluding any layer.
        budget: visual tokens kept while measuring.
        most_layers: layers to rank; neighbours are joined until there are no more.
        sensitivity_images: images that each graph of the sensitivity pass is run on.
        overwrite: replace an INT8 graph that the bundle has.
    """

    method: Method = "minmax"
    percentile: float = 99.999
    tolerance: Tolerance | None = field(default_factory=Tolerance)
    budget: int = 1
    most_layers: int = 32
    sensitivity_images: int = 2
    overwrite: bool = False


@dataclass(frozen=True)
class CalibrationResult:
    """What came out.

    Attributes:
        bundle: with the INT8 graph.
        sensitivity: the table.
        likeness: of the shipped INT8 graph to the reference, on the images judged.
    """

    bundle: Bundle
    sensitivity: Sensitivity
    likeness: Likeness


def default_budget(bundle: Bundle) -> int:
    """Return what the graph is optimised for, but at most half of the visual tokens: keeping all hides every change."""
    entry = next(iter(bundle.manifest.graphs.values()))
    return min(entry.spec.dim("budget").opt, max(1, bundle.manifest.dims.num_patches // 2))


def default_tolerance(bundle: Bundle, budget: int) -> Tolerance:
    """Return :class:`Tolerance`'s defaults, as far as they can be asked for at ``budget``.

    One exchanged token is always allowed: of a small kept set it is more than a tenth. With random weights the cosine
    alone is asked for: the scores of an untrained model lie as close together as its features, so that what it keeps
    hangs on rounding.
    """
    if bundle.manifest.source.weights.startswith("random"):
        return Tolerance(iou=0.0, coverage=0.0)
    whole_set, important = _judged(bundle, budget)
    count = budget if whole_set else important
    return Tolerance(iou=min(Tolerance().iou, max(0.0, (count - 1) / (count + 1))))


def _judged(bundle: Bundle, budget: int) -> tuple[bool, int]:
    """Return whether the whole kept set is judged, and the size of its important part."""
    selection = bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)
    return config.is_stable, config.important_tokens(budget)


def require_calibratable(bundle: Bundle, *, overwrite: bool) -> None:
    """Raise unless ``bundle`` has an fp16 graph, and no INT8 graph or leave to replace it.

    Raises:
        BundleError: without an fp16 graph.
        ConfigError: with an INT8 graph.
    """
    graphs = bundle.manifest.graphs
    if Precision.FP16.value not in graphs:
        raise BundleError(
            "INT8 is made from the fp16 graph, and the bundle has none",
            received=f"{bundle.path}: {', '.join(graphs)}",
            expected="a bundle with an fp16 graph",
            hint=bundle.export_command(Precision.FP32, Precision.FP16),
        )
    if Precision.INT8.value in graphs and not overwrite:
        raise ConfigError(
            "the bundle has an INT8 graph already",
            received=bundle.path,
            expected="a bundle without one, or --overwrite",
            hint=f"flashvlm calibrate {bundle.path} --overwrite",
        )


def calibrate(
    bundle: Bundle, samples: Sequence[Sample], settings: CalibrationSettings, progress: Progress | None = None
) -> CalibrationResult:
    """Add an INT8 graph to ``bundle``, or raise and leave it as it was.

    Args:
        bundle: with an fp16 graph; with an fp32 graph too, that one is the reference of the last check.
        samples: at least one; every fourth is held out for the last check.
        settings: see :class:`CalibrationSettings`.
        progress: where to tell.

    Raises:
        UsageError: without samples, or if a setting is out of range.
        BundleError: if the bundle has no fp16 graph, is damaged, or is being written by another process.
        CalibrationError: if activations are not finite, or the graph does not pass a check.
        StorageError: if the disk is full or not writable.
    """
    progress = progress or Progress()
    require_calibratable(bundle, overwrite=settings.overwrite)
    make_observer(settings.method, settings.percentile)
    check_budget(settings.budget, bundle.manifest.dims.num_patches)
    if not samples:
        raise UsageError("there are no images to calibrate with", expected="at least one image")
    with bundle_lock(bundle.path):
        work = bundle.path / WORK
        try:
            with storage_errors(bundle.path):
                result = _Calibration(bundle, samples, settings, progress, work).run()
        except BaseException:
            _clear(work, keep=PARTIAL)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return result


class _Calibration:
    """The steps in their order; each reads what the one before left in ``work``."""

    def __init__(
        self, bundle: Bundle, samples: Sequence[Sample], settings: CalibrationSettings, progress: Progress, work: Path
    ) -> None:
        self.bundle, self.settings, self.progress, self.work = bundle, settings, progress, work
        self.split = split_samples(samples)
        self.probe = bundle.path / f"{WORK}.probe.onnx"
        self.source = bundle.graph_file(Precision.FP16)
        self.structure = load_structure(self.source)
        self.products = find_products(self.structure.graph)
        self.layers = find_layers(self.structure.graph, self.products, settings.most_layers)
        self.whole_set, self.important = _judged(bundle, settings.budget)

    def run(self) -> CalibrationResult:
        self._print_settings()
        _clear(self.work, keep=PARTIAL)
        self.work.mkdir(exist_ok=True)
        # The INT8 weights are written twice, once with every layer quantised.
        require_free_space(self.work, 3 * weight_bytes(self.structure.graph) + (32 << 20))
        self.progress.step("fp16 graph: hash")
        graph_sha256 = self.bundle.graph_sha256(Precision.FP16, verify=True)
        ranges = self._ranges(graph_sha256)
        self.progress.step(f"INT8 graph: {len(self.products)} matrix products")
        full = self.work / "full.onnx"
        qdq_from_fp16(self.source, self.products, ranges.tensors, full)
        self.full = moved(load_structure(full), WORK)
        sensitivity = self._sensitivity()
        staging = self._stage(ranges, sensitivity)
        likeness, checks = self._check(staging / install.GRAPH, sensitivity)
        self.progress.step("into the bundle")
        entry = GraphEntry(install.GRAPH, self.bundle.manifest.graphs[Precision.FP16.value].spec)
        bundle = install.install(staging, self.bundle.path, entry, checks)
        return CalibrationResult(bundle, sensitivity, likeness)

    def _print_settings(self) -> None:
        settings, note = self.settings, self.progress.note
        self.progress.step(f"calibrating {self.bundle.path}")
        method = settings.method + (f" {settings.percentile} %" if settings.method == "percentile" else "")
        note(f"method       {method}; weights int8 per channel, activations int8 per tensor, around it float16")
        note(f"images       {len(self.split.calibration)} set the ranges, {len(self.split.held_out)} held out")
        if not self.split.held_out:
            note("NOTE: with one image nothing is held out: the figures are those of the image that set the ranges")
        judged = "the kept set" if self.whole_set else "its important part and coverage"
        note(f"tolerance    {settings.tolerance or 'none'}, at budget {settings.budget}, judged on {judged}")
        if self.bundle.manifest.source.weights.startswith("random"):
            note("NOTE: random weights: ranges and figures say nothing about a trained model")

    def _ranges(self, graph_sha256: str) -> Ranges:
        settings, samples = self.settings, self.split.calibration
        key = ranges_key(graph_sha256, settings.method, settings.percentile, samples)
        cached = decode_ranges(self.bundle.path / install.RANGES)
        if cached is not None and cached.key == key:
            self.progress.step(f"ranges: those in {install.RANGES}, of the same graph, images, prompts and method")
            return cached
        if cached is not None:
            changed = "graph" if cached.graph_sha256 != graph_sha256 else "images, prompts or method"
            self.progress.note(f"NOTE: {install.RANGES} is of another {changed}: ranges are measured anew")
        self.progress.step(f"ranges: {len(samples)} image(s) through the fp16 graph")
        return observe_ranges(
            self.structure,
            self.products,
            samples,
            graph_sha256=graph_sha256,
            method=settings.method,
            percentile=settings.percentile,
            probe=self.probe,
            partial=self.work / PARTIAL,
            progress=self.progress,
        )

    def _sensitivity(self) -> Sensitivity:
        samples = spread(self.split.calibration, self.settings.sensitivity_images)
        runs = most_runs(len(self.layers), len(samples))
        self.progress.step(f"sensitivity: {len(self.layers)} layers, {len(samples)} image(s), up to {runs} graph runs")
        feeds = [sample.feeds() for sample in samples]
        reference = readable_graph(self.structure, self.probe)
        wanted = [reference.read(feed) for feed in feeds]
        del reference

        def measure(layers: Sequence[Layer]) -> Likeness:
            graph = readable_graph(self._quantised(layers), self.probe)
            return compare(wanted, [graph.read(feed) for feed in feeds], self.important)

        found = analyse(
            self.layers,
            measure,
            tolerance=self.settings.tolerance or Tolerance(),
            enforced=self.settings.tolerance is not None,
            whole_set=self.whole_set,
            budget=self.settings.budget,
            images=[sample.name for sample in samples],
            progress=self.progress,
        )
        print_table(found, self.progress)
        found.require_tolerance()
        return found

    def _stage(self, ranges: Ranges, sensitivity: Sensitivity) -> Path:
        staging = self.work / "staging"
        (staging / install.RANGES).parent.mkdir(parents=True)
        (staging / install.RANGES).write_bytes(encode_record(ranges))
        (staging / install.SENSITIVITY).write_bytes(encode_record(sensitivity))
        quantised = [layer for layer in self.layers if layer.name not in sensitivity.excluded]
        model = self._quantised(quantised)
        onnx.load_external_data_for_model(model, str(self.bundle.path))
        save_graph(model, staging / install.GRAPH)
        return staging

    def _check(self, file: Path, sensitivity: Sensitivity) -> tuple[Likeness, dict[str, dict[str, float]]]:
        self.progress.step("INT8 graph: ONNX checker, census")
        excluded = [layer for layer in self.layers if layer.name in sensitivity.excluded]
        quantised = len(self.products) - sum(len(layer.products) for layer in excluded)
        census = check_int8_file(file, quantised)
        graphs = self.bundle.manifest.graphs
        precision = Precision.FP32 if Precision.FP32.value in graphs else Precision.FP16
        samples = self.split.judged
        self.progress.step(f"INT8 graph against {precision.value}: {len(samples)} image(s)")
        source = self.bundle.graph_file(precision)
        structure = load_structure(source)
        reference = readable_graph(structure, self.probe)
        wanted = [reference.read(sample.feeds()) for sample in self.progress.track(samples, "images")]
        del reference
        likeness = compare(wanted, shipped_readings(file, wanted, samples), self.important)
        reference_bytes = weight_bytes(structure.graph) * (1 if precision is Precision.FP32 else 2)
        ratio = (census.int8_weight_bytes + census.float_weight_bytes) / reference_bytes
        self.progress.note(f"at budget {self.settings.budget}: {likeness}; weights {ratio:.3f} of fp32's bytes")
        tolerance = self.settings.tolerance
        if tolerance is not None and tolerance.used(likeness, whole_set=self.whole_set) > 1.0:
            self.progress.note(
                "NOTE: the tolerance held on the calibration images, but does not on these: more images may help"
            )
        counts = {
            "images": len(self.split.calibration),
            "held_out": len(self.split.held_out),
            "layers": len(self.layers),
            "excluded_layers": len(excluded),
            "sensitivity_runs": sensitivity.runs,
        }
        return likeness, {
            "calibration": {name: float(value) for name, value in counts.items()},
            "census": {name: float(value) for name, value in asdict(census).items()} | {"weights_of_fp32": ratio},
            f"parity_{precision.value}": {**asdict(likeness), "budget": float(self.settings.budget)},
        }

    def _quantised(self, layers: Sequence[Layer]) -> onnx.ModelProto:
        nodes = {product.node for layer in layers for product in layer.products}
        return partly_quantised(self.full, self.structure, self.products, nodes)


def print_table(found: Sensitivity, progress: Progress) -> None:
    """Print the layers, worst first."""
    width = max(len(effect.layer) for effect in found.layers)
    progress.note(f"{'layer alone':<{width}}  cosine   IoU    important  coverage  of tolerance")
    for effect in found.layers:
        like = effect.likeness
        progress.note(
            f"{effect.layer:<{width}}  {like.cosine:.5f}  {like.iou:.3f}  {like.important_iou:.3f}      "
            f"{like.coverage:.3f}     {effect.share:.2f}{'  left in float16' if effect.excluded else ''}"
        )
    for name, like in (("all layers", found.everything), ("the result", found.chosen)):
        progress.note(
            f"{name:<{width}}  {like.cosine:.5f}  {like.iou:.3f}  {like.important_iou:.3f}      {like.coverage:.3f}"
        )


def _clear(work: Path, *, keep: str) -> None:
    """Remove everything from ``work`` but the file ``keep``; the directory too if that leaves it empty."""
    if not work.is_dir():
        return
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != keep:
            path.unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()
