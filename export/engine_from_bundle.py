"""Bundle → engine: the whole of ``flashvlm build``."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import (
    SCHEMA_VERSION,
    BuildSettings,
    Engine,
    EngineEntry,
    engine_file,
    sidecar_of,
    write_entry,
)
from flashvlm_export.errors import ConfigError, DependencyError, StorageError, TargetError, install_hint
from flashvlm_export.export.engine_from_onnx import engine_from_onnx
from flashvlm_export.files import atomic_write, bundle_lock, require_free_space, sha256_of, storage_errors
from flashvlm_export.gpu import Gpu, gpu_at_hand
from flashvlm_export.memory import available_bytes
from flashvlm_export.profiles import Profile, format_profile, resolve_profiles
from flashvlm_export.progress import Progress
from flashvlm_export.specs import GraphSpec, Precision
from flashvlm_export.targets import PORTABLE, RTX_CAPABILITIES, Target, find_target, format_capability
from flashvlm_export.tensorrt_api import Backend

# Largest resident memory of a build per byte of weights, and besides: above what TensorRT-RTX 1.7 was seen to take for
# the full-size fp16 graph (2.0 GB for 0.62 GB of weights, 0.4 GB for a tiny one).
_MEMORY_PER_WEIGHT_BYTE = 3.0
_MEMORY_AT_REST_BYTES = 1 << 29
# More than any GPU has.
_MOST_WORKSPACE_BYTES = 1 << 42


@dataclass(frozen=True)
class EngineSettings:
    """What ``flashvlm build`` was asked for.

    Attributes:
        bundle: directory of the bundle.
        precision: graph to build from.
        target: row of the target table; ``None`` is the GPU at hand.
        backend: library; ``auto`` takes TensorRT where it can build for the target, else TensorRT-RTX.
        profiles: texts for :func:`flashvlm_export.profiles.resolve_profiles`.
        build: passed to the builder.
        timing_cache: file to read and to write back; ``None`` for none.
        for_triton: make the budget the width of an input, so that Triton can batch; TensorRT only.
        overwrite: replace an engine for the same target and precision.
    """

    bundle: Path
    precision: Precision = Precision.FP16
    target: str | None = None
    backend: Backend | Literal["auto"] = "auto"
    profiles: Sequence[str] = ()
    build: BuildSettings = field(default_factory=BuildSettings)
    timing_cache: Path | None = None
    for_triton: bool = False
    overwrite: bool = False


def engine_from_bundle(settings: EngineSettings, progress: Progress | None = None) -> Engine:
    """Build an engine into the bundle and return it; on any error the bundle is as it was.

    Raises:
        BundleError, ConfigError, DependencyError, ExportError, StorageError: see their messages.
        TargetError: the engine cannot be built on this machine; where it can on another, the message has the command.
    """
    progress = progress or Progress()
    workspace = settings.build.workspace_bytes
    if workspace is not None and not 0 < workspace < _MOST_WORKSPACE_BYTES:
        raise ConfigError(
            "the workspace is out of range",
            received=f"{workspace / 1e6:.0f} MB",
            expected=f"1 to {_MOST_WORKSPACE_BYTES / 1e6:.0f} MB",
            hint="leave --workspace-mb out to allow all of the GPU's memory",
        )
    if settings.for_triton:
        settings = _for_triton(settings)
    bundle = Bundle.open(settings.bundle)
    gpu = gpu_at_hand()
    target = resolve_target(settings.target, gpu)
    graph = bundle.graph_file(settings.precision)
    backend = resolve_backend(settings, target, gpu)
    spec = bundle.manifest.graphs[settings.precision.value].spec
    profiles = resolve_profiles(spec, settings.profiles)
    file = engine_file(bundle, target.name, settings.precision, for_triton=settings.for_triton)
    weights_bytes = sum(entry.size_bytes for entry in bundle.graph_files(settings.precision).values())
    _print_settings(settings, target, backend, profiles, weights_bytes, progress)
    if settings.target is None and gpu is None:
        progress.note(f"NOTE: no GPU at hand: this is a portable engine for {target.devices}")
    with bundle_lock(bundle.path):
        if sidecar_of(file).exists() and not settings.overwrite:
            raise StorageError(
                "the bundle has an engine for this target and precision",
                received=file,
                expected="a new one, or --overwrite",
                hint="add --overwrite to replace it once the new one is whole, or remove it",
            )
        _require_memory(weights_bytes)
        require_free_space(file, weights_bytes * len(target.compute_capabilities))
        # An engine of a damaged graph would be damaged for good.
        graph_sha256 = bundle.graph_sha256(settings.precision, verify=True)
        instead = None
        if settings.for_triton:
            spec, instead = _with_budget_shape(spec, graph)
        progress.step(f"building with {backend}")
        start = time.perf_counter()
        with storage_errors(file):
            file.parent.mkdir(exist_ok=True)
            for leftover in file.parent.glob(".*.partial"):  # of a killed build: nobody else writes under the lock
                leftover.unlink()
            with atomic_write(file) as temporary:
                with temporary.open("wb") as output:
                    built = engine_from_onnx(
                        graph,
                        spec,
                        backend,
                        output,
                        profiles=profiles,
                        instead=instead,
                        capabilities=target.compute_capabilities,
                        settings=settings.build,
                        timing_cache=_read_cache(settings.timing_cache),
                        progress=progress,
                    )
                build_s = time.perf_counter() - start
                progress.step(f"writing {file}")
                digest, size_bytes = sha256_of(temporary), temporary.stat().st_size
                # From here to the sidecar's own writing, a kill leaves an engine that nothing lists.
                sidecar_of(file).unlink(missing_ok=True)
        entry = EngineEntry(
            schema_version=SCHEMA_VERSION,
            target=target.name,
            backend=backend,
            backend_version=str(tensorrt_api.load(backend).__version__),
            compute_capabilities=[format_capability(capability) for capability in target.compute_capabilities],
            precision=settings.precision.value,
            graph_sha256=graph_sha256,
            engine_sha256=digest,
            size_bytes=size_bytes,
            profiles=[list(profile) for profile in profiles],
            settings=settings.build,
            build_s=round(build_s, 1),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            census=built.census,
            for_triton=settings.for_triton,
        )
        write_entry(file, entry)
    if settings.timing_cache is not None and built.timing_cache is not None:
        with atomic_write(settings.timing_cache) as temporary:
            temporary.write_bytes(built.timing_cache)
    progress.step(f"engine written: {file}")
    return Engine(file, entry)


def _with_budget_shape(spec: GraphSpec, graph: Path) -> tuple[GraphSpec, bytes]:
    """Return contract and bytes of the graph whose budget is a shape; it takes onnx, which a device need not have."""
    try:
        from flashvlm_export.export.budget_shape import graph_with_budget_shape, spec_with_budget_shape
    except ImportError as error:
        raise DependencyError(
            "an engine for Triton needs onnx, which rewrites the graph",
            received=str(error),
            hint=install_hint("export"),
        ) from error
    return spec_with_budget_shape(spec), graph_with_budget_shape(graph).SerializeToString()


def _for_triton(settings: EngineSettings) -> EngineSettings:
    """Return the settings with TensorRT as backend; raise :class:`ConfigError` for what Triton cannot serve."""
    if settings.backend == "tensorrt-rtx":
        raise ConfigError("Triton has no backend for TensorRT-RTX", expected="--backend tensorrt with --for-triton")
    if settings.build.strip_weights:
        raise ConfigError("Triton does not put weights back into an engine", expected="no --strip-weights")
    return replace(settings, backend="tensorrt")


def resolve_target(name: str | None, gpu: Gpu | None) -> Target:
    """Return the row called ``name``; without a name one for the GPU at hand, or without a GPU the portable one.

    Raises:
        ConfigError: unknown target.
    """
    if name is not None:
        return find_target(name)
    if gpu is None:
        return find_target(PORTABLE)
    return Target("sm{}{}".format(*gpu.capability), gpu.name, (gpu.capability,), platform.machine())


def possible_backends(target: Target, gpu: Gpu | None) -> list[Backend]:
    """Return the libraries that can build for ``target`` on a machine like this one; ``gpu`` is the one at hand."""
    possible: list[Backend] = []
    if target.machine == platform.machine():
        if gpu is not None and target.compute_capabilities == (gpu.capability,):
            possible.append("tensorrt")
        if set(target.compute_capabilities) <= set(RTX_CAPABILITIES):
            possible.append("tensorrt-rtx")
    return possible


def resolve_backend(settings: EngineSettings, target: Target, gpu: Gpu | None) -> Backend:
    """Return the library that builds for ``target`` on this machine; ``gpu`` is the one at hand.

    Raises:
        DependencyError: the library that can build it is not installed.
        TargetError: it cannot be built on this machine; the message has the command that takes it to the other one.
    """
    possible = possible_backends(target, gpu)
    wanted = [backend for backend in possible if settings.backend in ("auto", backend)]
    if not wanted:
        here = "no GPU" if gpu is None else f"{gpu.name}, compute capability {format_capability(gpu.capability)}"
        raise TargetError(
            f"{settings.backend} cannot build for {target.name} on this machine"
            if possible
            else f"an engine for {target.name} has to be built on that device",
            received=f"this machine: {platform.machine()}, {here}; --backend {settings.backend}",
            expected=f"{target.machine} with compute capability {target.capabilities}",
            hint=f"make an archive that builds it there: flashvlm pack {settings.bundle} --target {target.name} "
            f"--precision {settings.precision.value}",
        )
    installed = [backend for backend in wanted if tensorrt_api.is_installed(backend)]
    if not installed:
        raise DependencyError(
            "no library that builds this engine is installed",
            expected=" or ".join(wanted),
            hint=" or ".join(map(tensorrt_api.install_hint, wanted)),
        )
    return installed[0]


def _print_settings(
    settings: EngineSettings,
    target: Target,
    backend: Backend,
    profiles: Sequence[Profile],
    weights_bytes: int,
    progress: Progress,
) -> None:
    build = settings.build
    progress.step(f"engine of {settings.bundle}, {settings.precision.value}")
    progress.note(f"target       {target.name}: {target.devices}, compute capability {target.capabilities}")
    progress.note(f"backend      {backend}")
    for profile in profiles:
        progress.note(f"profile      {format_profile(profile)}")
    workspace = "all of the GPU" if build.workspace_bytes is None else f"{build.workspace_bytes / 1e6:.0f} MB"
    progress.note(f"workspace    {workspace}; optimisation level {build.optimization_level}")
    modes = {
        "version-compatible": build.version_compatible,
        "hardware-compatible": build.hardware_compatible,
        "weights stripped": build.strip_weights,
    }
    if any(modes.values()):
        progress.note("modes        " + ", ".join(name for name, on in modes.items() if on))
    progress.note(
        f"needs about  {_memory_bytes(weights_bytes) / 1e9:.1f} GB of memory, "
        f"{weights_bytes * len(target.compute_capabilities) / 1e9:.2f} GB of disk at most"
    )


def _memory_bytes(weights_bytes: int) -> int:
    return _MEMORY_AT_REST_BYTES + int(_MEMORY_PER_WEIGHT_BYTE * weights_bytes)


def _require_memory(weights_bytes: int) -> None:
    """Raise :class:`TargetError` where the build would be killed half-way."""
    available = available_bytes()
    if available < _memory_bytes(weights_bytes):
        raise TargetError(
            "not enough memory to build this engine",
            received=f"{available / 1e9:.1f} GB available",
            expected=f"about {_memory_bytes(weights_bytes) / 1e9:.1f} GB",
            hint="stop other programs, add swap, or build on a machine with more",
        )


def _read_cache(file: Path | None) -> bytes | None:
    if file is None:
        return None
    return file.read_bytes() if file.is_file() else b""
