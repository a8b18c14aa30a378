"""Checkpoint → bundle: the whole of ``flashvlm export``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from flashvlm_export import __version__
from flashvlm_export.bundle import (
    NEWLINE,
    PREPROCESSOR,
    TEXT_EMBEDDINGS,
    VIDEO_PREPROCESSOR,
    Bundle,
    describe_files,
    write_manifest,
)
from flashvlm_export.errors import (
    CheckpointError,
    ConfigError,
    DependencyError,
    FlashVLMError,
    StorageError,
    install_hint,
)
from flashvlm_export.export.checkpoint import WeightSource
from flashvlm_export.export.checks import check_graph
from flashvlm_export.export.engine_check import check_engine_builds
from flashvlm_export.export.locate import open_weights
from flashvlm_export.export.onnx_graph import onnx_from_visual_graph
from flashvlm_export.export.processor_files import (
    read_preprocessor,
    read_video_preprocessor,
    write_prompt_files,
)
from flashvlm_export.export.split import write_split_graphs
from flashvlm_export.export.text_model import (
    count_text_parameters,
    text_model_tensors,
    write_newline,
    write_text_embeddings,
)
from flashvlm_export.export.visual_graph import build_visual_graph
from flashvlm_export.files import atomic_directory, bundle_lock, require_free_space, storage_errors
from flashvlm_export.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    DecoderEntry,
    GraphEntry,
    Manifest,
    Selection,
    Source,
    SplitGraphs,
)
from flashvlm_export.models import adapter_class, find_model
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.preprocessor import encode_preprocessor
from flashvlm_export.progress import Progress
from flashvlm_export.selection import SELECTORS, Selector, get_selector
from flashvlm_export.specs import Precision
from flashvlm_export.tensorrt_api import is_installed

DecoderChoice = Literal["auto", "none", "fp32", "fp16", "int8", "int4"]
EngineCheck = Literal["auto", "off", "required"]

# Below this many parameters a float32 decoder is small and fast enough anywhere; above it, int4 is what fits.
_SMALL_LLM = 1_000_000_000
# Pillow among them: its versions resize differently in the last bit.
_TOOLS = (
    "torch",
    "transformers",
    "tokenizers",
    "pillow",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "tensorrt_rtx_cu12",
)


@dataclass(frozen=True)
class ExportSettings:
    """What ``flashvlm export`` was asked for.

    Attributes:
        model: registry name, hub id, or checkpoint directory; a label where ``weights`` is a directory.
        output: directory of the bundle.
        weights: ``auto``, ``random[:SEED]``, or a checkpoint directory.
        revision: branch, tag or commit on the hub.
        precisions: visual graphs to write.
        selector: registry name of the selector.
        selection: settings of the selector that differ from its defaults.
        split: also write encoder and selectors as graphs of their own.
        further_selectors: names of selectors to write besides ``selector``, with their defaults, or ``("all",)`` for
            all that this family can have; needs ``split``.
        decoder: LLM decoder to export; ``auto`` is fp32 below a billion parameters and int4 above, none for random
            weights.
        engine_check: compile each graph with TensorRT-RTX: where installed, never, or fail without it.
        overwrite: replace a bundle that stands at ``output``.
    """

    model: str
    output: Path
    weights: str = "auto"
    revision: str | None = None
    precisions: Sequence[Precision] = (Precision.FP32, Precision.FP16)
    selector: str = "flashvlm"
    selection: Mapping[str, Any] = field(default_factory=dict)
    split: bool = False
    further_selectors: Sequence[str] = ()
    decoder: DecoderChoice = "auto"
    engine_check: EngineCheck = "auto"
    overwrite: bool = False


def bundle_from_checkpoint(settings: ExportSettings, progress: Progress | None = None) -> Bundle:
    """Export ``settings.model`` and return the opened bundle; on any error nothing is left at ``settings.output``.

    Raises:
        ConfigError, CheckpointError, ExportError, StorageError, DependencyError: see their messages.
    """
    progress = progress or Progress()
    selector = get_selector(settings.selector)
    selector.make_config(settings.selection)
    _check_settings(settings)

    weights = open_weights(settings.model, settings.weights, revision=settings.revision)
    adapter = _open_adapter(weights)
    preprocessor = read_preprocessor(adapter, weights, progress)
    adapter.take_processor(preprocessor)
    if "all" in settings.further_selectors:
        fitting = [name for name, row in SELECTORS.items() if adapter.dims.has_one_size or not row.needs_fixed_grid]
        settings = replace(settings, further_selectors=fitting)
    _check_selectors(settings, adapter)
    config = _selection_config(selector, adapter, settings.selection)
    decoder = _resolve_decoder(settings, adapter, weights)
    _print_settings(settings, adapter, weights, config, decoder, progress)
    if decoder != "none":
        _require_decoder(adapter)
    require_free_space(settings.output, _size_bytes(settings, adapter, decoder))

    # What stands there is replaced as a whole, but not under the hands of a calibration or a build.
    standing = bundle_lock(settings.output) if settings.output.is_dir() else contextlib.nullcontext()
    with standing, atomic_directory(settings.output) as staging:
        # What is quick comes first, so that a checkpoint that lacks something is refused at once.
        progress.step("text embeddings")
        write_text_embeddings(staging / TEXT_EMBEDDINGS, adapter, weights)
        write_newline(staging / NEWLINE, adapter, weights)
        prompt = None
        if weights.directory is not None:
            progress.step("tokenizer, chat template, image processor")
            prompt = write_prompt_files(weights.directory, staging, adapter, progress)
        (staging / PREPROCESSOR).write_bytes(encode_preprocessor(preprocessor))
        video = adapter.video if prompt is None or prompt.video_token else None
        if video is not None:
            frames = read_video_preprocessor(adapter, weights, progress)
            (staging / VIDEO_PREPROCESSOR).write_bytes(encode_preprocessor(frames))
        graphs, halves, checks = {}, {}, {}
        for precision in settings.precisions:
            graphs[precision.value], half, checks[precision.value] = _write_graphs(
                staging, adapter, weights, selector, config, precision, settings, progress
            )
            if half is not None:
                halves[precision.value] = half
        weights_sha256 = weights.fingerprint()  # before the decoder, so that it is the same without one
        entry = _write_decoder(staging, adapter, weights, decoder, progress) if decoder != "none" else None
        progress.step("hashes and manifest")
        size_bytes = sum(file.stat().st_size for file in staging.rglob("*"))
        with progress.bar(size_bytes, "hashed", "B") as bar:
            files = describe_files(staging, bar.update)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            source=Source(
                model=settings.model,
                family=adapter.family,
                weights=weights.label,
                config_sha256=hashlib.sha256(json.dumps(weights.config, sort_keys=True).encode()).hexdigest(),
                weights_sha256=weights_sha256,
            ),
            dims=adapter.dims,
            selection=Selection(selector.name, asdict(config)),
            graphs=graphs,
            vocab_size=adapter.vocab_size,
            prompt=prompt,
            decoder=entry,
            files=files,
            tools={"flashvlm-export": __version__, **_tool_versions()},
            checks=checks,
            split=halves,
            position_axes=3 if adapter.position_sections else 1,
            video=video,
        )
        write_manifest(staging, manifest)
        Bundle.open(staging)
    progress.step(f"bundle written: {settings.output}")
    return Bundle.open(settings.output)


def _check_settings(settings: ExportSettings) -> None:
    if not settings.precisions:
        raise ConfigError("no precision to export", expected="fp32, fp16 or both")
    if Precision.INT8 in settings.precisions:
        raise ConfigError(
            "an INT8 graph is not exported but calibrated",
            received="int8",
            expected="fp32, fp16",
            hint="export fp16, then: flashvlm calibrate BUNDLE",
        )
    for name in settings.further_selectors:
        if name != "all":
            get_selector(name)
    if settings.further_selectors and not settings.split:
        raise ConfigError(
            "further selectors are graphs of their own",
            received=", ".join(settings.further_selectors),
            expected="split",
        )
    if settings.engine_check == "required" and not is_installed("tensorrt-rtx"):
        raise DependencyError(
            "the engine check needs TensorRT-RTX", hint=f"{install_hint('rtx')}; or use --engine-check auto"
        )
    with storage_errors(settings.output):
        is_taken = settings.output.exists()
        # A damaged bundle may be replaced, another program's directory never: those have a manifest.json too.
        manifest = settings.output / MANIFEST
        is_bundle = manifest.is_file() and (
            b'"schema_version"' in manifest.read_bytes() or (settings.output / TEXT_EMBEDDINGS).is_file()
        )
        is_empty = settings.output.is_dir() and not any(settings.output.iterdir())
    if is_taken and not is_empty and not (is_bundle and settings.overwrite):
        raise StorageError(
            "the output path is taken",
            received=f"{settings.output} ({'a bundle' if is_bundle else 'not a bundle'})",
            expected="a new path, an empty directory, or a bundle together with --overwrite",
            hint=f"add --overwrite to replace it once the new one is whole, or remove {settings.output}"
            if is_bundle
            else "choose another path",
        )


def _check_selectors(settings: ExportSettings, adapter: Adapter) -> None:
    for name in (settings.selector, *settings.further_selectors):
        if get_selector(name).needs_fixed_grid and not adapter.dims.has_one_size:
            raise ConfigError(
                f"the selector '{name}' needs the same grid of visual tokens in every image",
                received=f"{adapter.family}: {adapter.dims.describe_pictures()}",
                expected="another selector, or a model that sees every image as one picture of one size",
            )


def _selection_config(selector: Selector, adapter: Adapter, settings: Mapping[str, Any]) -> Any:
    """Return what is asked for, and where nothing is, what the family takes instead of the selector's defaults."""
    known = {field.name for field in fields(selector.config_type)}
    defaults = {name: value for name, value in adapter.selection_defaults.items() if name in known}
    return selector.make_config({**defaults, **settings})


def _open_adapter(weights: WeightSource) -> Adapter:
    model_type = weights.config["model_type"]
    try:
        adapter = adapter_class(model_type)(weights.config)
        adapter.encoder(needs_saliency=True)
    except FlashVLMError:
        raise
    except Exception as error:  # someone's numbers in transformers' constructors: they raise anything
        raise CheckpointError(
            "config.json does not describe a model that can be built",
            received=f"{type(error).__name__}: {str(error)[:300]}",
            expected=f"the settings of a {model_type} model that this version of transformers knows",
            hint="compare it with the config.json of the original checkpoint, or upgrade transformers",
        ) from error
    return adapter


def _resolve_decoder(settings: ExportSettings, adapter: Adapter, weights: WeightSource) -> DecoderChoice:
    if weights.directory is None:
        if settings.decoder not in ("auto", "none"):
            raise ConfigError(
                "a decoder with random weights has no use", received=settings.decoder, expected="--decoder none"
            )
        return "none"
    if settings.decoder != "auto":
        return settings.decoder
    return "fp32" if count_text_parameters(adapter) < _SMALL_LLM else "int4"


def _print_settings(
    settings: ExportSettings,
    adapter: Adapter,
    weights: WeightSource,
    config: Any,
    decoder: DecoderChoice,
    progress: Progress,
) -> None:
    dims = adapter.dims
    progress.step(f"exporting {settings.model} to {settings.output}")
    progress.note(f"weights      {weights.label}{f' {weights.directory}' if weights.directory else ''}")
    progress.note(
        f"visual side  {adapter.family}, {dims.describe_pictures()}, widths {dims.vision_width} → {dims.llm_width}"
    )
    for note in adapter.notes:
        progress.note(f"NOTE: {note}")
    progress.note(f"precisions   {', '.join(precision.value for precision in settings.precisions)}")
    progress.note(f"selector     {settings.selector} {asdict(config)}")
    if settings.split:
        names = dict.fromkeys((settings.selector, *settings.further_selectors))
        progress.note(f"split        encoder, and the selectors {', '.join(names)}")
    progress.note(f"decoder      {decoder}")
    progress.note(
        f"engine check {settings.engine_check} (TensorRT-RTX {'' if is_installed('tensorrt-rtx') else 'not '}installed)"
    )
    named = find_model(settings.model)
    if named is None and settings.weights != "auto":
        progress.note(
            f"NOTE: {settings.model!r} is no registered model; {settings.weights} alone decides what is exported"
        )
    if named is not None and weights.directory is not None:
        expected = adapter_class(named.family)(named.config).dims
        if expected != dims:
            progress.note(f"NOTE: this checkpoint is not {named.name}, which has {expected}; its own sizes are used")


def _size_bytes(settings: ExportSettings, adapter: Adapter, decoder: DecoderChoice) -> int:
    """Return an upper estimate of what the export writes."""
    encoder = sum(parameter.numel() for parameter in adapter.encoder(needs_saliency=True).parameters())
    graphs = sum(encoder * (4 if precision is Precision.FP32 else 2) for precision in settings.precisions)
    # The decoder's weights are laid out once as a checkpoint for the model builder, then written again.
    bytes_per_weight = {"none": 0, "auto": 0, "fp32": 8, "fp16": 6, "int8": 6, "int4": 5}[decoder]
    llm_bytes = bytes_per_weight and bytes_per_weight * count_text_parameters(adapter)
    return graphs + adapter.vocab_size * adapter.dims.llm_width * 4 + llm_bytes + (32 << 20)


def _write_graphs(
    staging: Path,
    adapter: Adapter,
    weights: WeightSource,
    selector: Selector,
    config: Any,
    precision: Precision,
    settings: ExportSettings,
    progress: Progress,
) -> tuple[GraphEntry, SplitGraphs | None, dict[str, Any]]:
    def step(text: str) -> None:
        progress.step(f"visual graph {precision.value}: {text}")

    step("weights")
    module = build_visual_graph(adapter, weights, selector, config, precision, progress, needs_saliency=settings.split)
    inputs = adapter.inputs(precision, batch=2, text=9, budget=max(1, adapter.sample_patches // 3))
    step("torch → ONNX")
    graph = onnx_from_visual_graph(module, inputs, staging / f"visual.{precision.value}.onnx")
    report = check_graph(graph, adapter, module.float(), config, precision, step)
    del module
    progress.note(
        f"encoder error {report.encoder_error:.1e}; kept tokens exact for {report.exact_rows} of "
        f"{report.exact_rows + report.tied_rows} images, {report.tied_rows} decided by a tie"
    )
    checks: dict[str, Any] = {"parity": asdict(report)}
    compile_engines = settings.engine_check != "off" and is_installed("tensorrt-rtx")
    if compile_engines:
        step("compile with TensorRT-RTX")
        checks["tensorrt_rtx"] = check_engine_builds(graph.file, inputs.spec)
    else:
        progress.note(
            f"not compiled with TensorRT-RTX ({'switched off' if is_installed('tensorrt-rtx') else 'not installed'})"
        )
    halves = None
    if settings.split:
        configs = {selector.name: config}
        for name in settings.further_selectors:
            configs.setdefault(name, _selection_config(get_selector(name), adapter, {}))
        halves, measured = write_split_graphs(
            graph, adapter, configs, precision, compile_engines=compile_engines, progress=step
        )
        checks |= measured
    graph.probe.unlink()
    return GraphEntry(graph.file.name, inputs.spec), halves, checks


def _require_decoder(adapter: Adapter) -> None:
    from flashvlm_export.export.decoder import require_exportable

    require_exportable(adapter.text_config)


def _write_decoder(
    staging: Path, adapter: Adapter, weights: WeightSource, decoder: DecoderChoice, progress: Progress
) -> DecoderEntry:
    from flashvlm_export.export.decoder import export_decoder

    progress.step(f"LLM decoder {decoder}")
    tensors = text_model_tensors(adapter, weights, progress)
    return export_decoder(adapter.text_config, tensors, staging / "llm", decoder, adapter.position_sections)


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # optional ones are recorded where installed
            versions[name] = importlib.metadata.version(name)
    return versions
