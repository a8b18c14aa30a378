"""Bundle → model repository of Triton Inference Server: the whole of ``flashvlm export-triton``.

::

    REPOSITORY/
      NAME/
        config.pbtxt                 inputs, outputs, batching (see triton_config.py)
        1/model.onnx                 the graph, its budget a shape (see budget_shape.py)
        1/visual.PRECISION.onnx.data its weights, as they are in the bundle
        1/model.plan                 or an engine instead, built with flashvlm build --for-triton

A repository may hold other models: only ``NAME`` is written, as a whole.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tqdm.utils import CallbackIOWrapper

from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import Engine, check_engine, find_engine
from flashvlm_export.errors import ConfigError, StorageError
from flashvlm_export.export.budget_shape import graph_with_budget_shape, spec_with_budget_shape
from flashvlm_export.export.triton_config import HEADER, ONNX_RUNTIME, TENSORRT, Batching, model_config
from flashvlm_export.files import atomic_directory, require_free_space, storage_errors
from flashvlm_export.profiles import Profile
from flashvlm_export.progress import Progress
from flashvlm_export.specs import Precision

CONFIG = "config.pbtxt"
VERSION = "1"

# Names a directory, a part of URLs and a label of metrics.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
# int32 in Triton's schema.
_MOST = (1 << 31) - 1
# The configuration, and what a file system spends on directories.
_BESIDES_BYTES = 1 << 16


@dataclass(frozen=True)
class TritonSettings:
    """What ``flashvlm export-triton`` was asked for.

    Attributes:
        bundle: directory of the bundle.
        output: the repository; made where there is none.
        name: of the model in it.
        precision: graph to serve, or of which the engine is; ``None`` takes the bundle's first, or the only engine's.
        engine: target of the engine to serve, or ``auto`` for the only one; ``None`` serves the graph.
        max_batch: most images of one run; ``None`` takes what the graph declares, or the engine was built for.
        max_queue_delay_us: microseconds that a request waits for company.
        instances: copies of the model on each GPU, or on the processor.
        overwrite: replace a model of this name that an earlier run wrote.
    """

    bundle: Path
    output: Path
    name: str = "flashvlm"
    precision: Precision | None = None
    engine: str | None = None
    max_batch: int | None = None
    max_queue_delay_us: int = 0
    instances: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class TritonModel:
    """What was written.

    Attributes:
        directory: of the model.
        backend: that of Triton which runs it.
        backend_version: of TensorRT, which Triton has to bring in exactly this version; ``None`` for ONNX Runtime.
        precision: of the graph or the engine.
        max_batch: most images of one run; 0 where Triton cannot put requests together.
        files: written, relative to the repository, with their sizes in bytes.
    """

    directory: Path
    backend: str
    backend_version: str | None
    precision: str
    max_batch: int
    files: dict[str, int]


def triton_repository(settings: TritonSettings, progress: Progress | None = None) -> TritonModel:
    """Write the model; on any error what stood in the repository is as it was.

    Raises:
        BundleError: if the bundle or its engine is not whole, or has no engine for Triton.
        ConfigError: a name, precision or number that cannot be.
        StorageError: if the model stands there already, or the disk is full.
    """
    progress = progress or Progress()
    if not _NAME.fullmatch(settings.name):
        raise ConfigError(
            "not a name of a model",
            received=repr(settings.name),
            expected="letters, digits, '_', '-' and '.', at most 128, of which the first is a letter or a digit",
        )
    _require_within("--instances", settings.instances, 1, _MOST)
    _require_within("--max-queue-delay-us", settings.max_queue_delay_us, 0, _MOST)
    if settings.max_batch is not None:
        _require_within("--max-batch", settings.max_batch, 1, _MOST)
    directory = settings.output / settings.name
    _require_free(directory, overwrite=settings.overwrite)
    progress.step(f"checking {settings.bundle}")
    bundle = Bundle.open(settings.bundle)
    engine = None
    if settings.engine is not None:
        target = None if settings.engine == "auto" else settings.engine
        engine = find_engine(bundle, settings.precision, target, for_triton=True)
        check_engine(bundle, engine)
    precision = Precision(engine.entry.precision) if engine else settings.precision or _first(bundle)
    graph = bundle.graph_file(precision)
    if engine is None:
        bundle.graph_sha256(precision, verify=True)
    spec = spec_with_budget_shape(bundle.manifest.graphs[precision.value].spec)
    profiles: list[Profile] = [tuple(profile) for profile in engine.entry.profiles] if engine else []
    dims = [dim for profile in profiles or [spec.dims] for dim in profile]
    batching = _batching(settings, bundle, max(dim.max for dim in dims if dim.name == "batch"), engine)
    backend = TENSORRT if engine else ONNX_RUNTIME
    version = f" {engine.entry.backend_version}, {engine.entry.target}" if engine else ""
    progress.note(f"model        {settings.name}: {backend.name}{version}, {precision.value}")
    progress.note(f"batches      {_describe(batching)}")
    config = model_config(settings.name, backend, spec, batching, profiles, _parameters(bundle))
    content = engine.file if engine else graph_with_budget_shape(graph).SerializeToString()
    beside = [] if engine else [bundle.path / name for name in bundle.graph_files(precision) if name != graph.name]
    files = {f"{VERSION}/{backend.file}": content, **{f"{VERSION}/{file.name}": file for file in beside}}
    require_free_space(directory, sum(map(_size, files.values())) + _BESIDES_BYTES)
    progress.step(f"writing {directory}")
    with atomic_directory(directory) as temporary:
        (temporary / VERSION).mkdir()
        (temporary / CONFIG).write_text(config, encoding="utf-8")
        _write(files, temporary, progress)
    progress.step(f"model written: {directory}")
    sizes = {CONFIG: len(config.encode()), **{name: _size(content) for name, content in files.items()}}
    return TritonModel(
        directory,
        backend.name,
        engine.entry.backend_version if engine else None,
        precision.value,
        batching.max_batch,
        {f"{settings.name}/{name}": size for name, size in sizes.items()},
    )


def _first(bundle: Bundle) -> Precision:
    return Precision(next(iter(bundle.manifest.graphs)))


def _require_within(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{option} is out of range", received=value, expected=f"{least} to {most}")


def _require_free(directory: Path, *, overwrite: bool) -> None:
    """Raise :class:`StorageError` unless ``directory`` may be written: what others put there never."""
    with storage_errors(directory):
        if not directory.exists():
            return
        config = directory / CONFIG
        is_ours = config.is_file() and config.read_bytes().startswith(HEADER.encode())
        others = sorted(path.name for path in directory.iterdir() if path.name not in (CONFIG, VERSION))
    if is_ours and overwrite and others:
        raise StorageError(
            "the model's directory has more than this command wrote, which would be lost",
            received=f"{directory}: {', '.join(others)}",
            expected=f"{CONFIG} and {VERSION} alone",
            hint="move the rest away, or export under another --name",
        )
    if not (is_ours and overwrite):
        raise StorageError(
            "the repository has a model of this name",
            received=f"{directory} ({'written' if is_ours else 'not written'} by flashvlm export-triton)",
            expected="another --name" + (", or --overwrite" if is_ours else ""),
        )


def _batching(settings: TritonSettings, bundle: Bundle, most: int, engine: Engine | None) -> Batching:
    """Return how requests are put together, of up to ``most`` images if nothing else is said.

    Raises:
        ConfigError: if they cannot be, or not as many.
    """
    if not bundle.manifest.dims.has_one_size:
        # ``layout`` counts through the pictures or windows of all images of a run: of requests put together, only the
        # first would be right.
        if settings.max_batch is not None or settings.max_queue_delay_us:
            raise ConfigError(
                "Triton cannot put requests to this model together",
                received="--max-batch or --max-queue-delay-us",
                expected="neither: which visual tokens are whose is counted through all images of a run",
                hint="leave them out; a client may send several images in one request",
            )
        return Batching(0, instances=settings.instances)
    if engine is not None and settings.max_batch is not None and settings.max_batch > most:
        raise ConfigError(
            "the engine was built for smaller batches",
            received=f"--max-batch {settings.max_batch}",
            expected=f"at most {most}",
            hint=f"build one that takes them: --profile batch=1:1:{settings.max_batch}",
        )
    max_batch = settings.max_batch or most
    if max_batch == 1 and settings.max_queue_delay_us:
        raise ConfigError(
            "a request that is run alone waits for nobody",
            received=f"--max-queue-delay-us {settings.max_queue_delay_us} with batches of one image",
            expected="no delay, or --max-batch above 1",
        )
    return Batching(max_batch, settings.max_queue_delay_us, settings.instances)


def _describe(batching: Batching) -> str:
    if batching.max_batch == 0:
        return "none: each request is run alone, because of how this family lays its visual tokens out"
    if batching.max_batch == 1:
        return "none: each request is run alone"
    waits = f"waiting up to {batching.max_queue_delay_us} us" if batching.max_queue_delay_us else "without waiting"
    return f"up to {batching.max_batch} images of the same budget and text length, {waits} for company"


def _parameters(bundle: Bundle) -> dict[str, str]:
    """Return what tells a client whether the model is that of its own bundle."""
    manifest = bundle.manifest
    return {"weights_sha256": manifest.source.weights_sha256, "selector": manifest.selection.selector}


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _write(files: dict[str, Path | bytes], directory: Path, progress: Progress) -> None:
    with progress.bar(sum(map(_size, files.values())), "copying", "B") as bar:
        for name, content in files.items():
            if isinstance(content, bytes):
                (directory / name).write_bytes(content)
                bar.update(len(content))
            else:
                with content.open("rb") as source, (directory / name).open("wb") as target:
                    shutil.copyfileobj(CallbackIOWrapper(bar.update, source, "read"), target, 1 << 22)
