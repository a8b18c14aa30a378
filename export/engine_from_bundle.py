"""Bundle → engine: the whole of ``flashvlm build``."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import (
    SCHEMA_VERSION,
    BuildSettings,
    Engine,
    EngineEntry,
    build_command,
    engine_file,
    graph_fingerprint,
    sidecar_of,
    write_entry,
)
from flashvlm_export.errors import ConfigError, DependencyError, StorageError, TargetError
from flashvlm_export.export.engine_from_onnx import engine_from_onnx
from flashvlm_export.files import atomic_write, bundle_lock, require_free_space, sha256_of, storage_errors
from flashvlm_export.gpu import Gpu, gpu_at_hand
from flashvlm_export.profiles import Profile, format_profile, resolve_profiles
from flashvlm_export.progress import Progress
from flashvlm_export.specs import Precision
from flashvlm_export.targets import PORTABLE, RTX_CAPABILITIES, TARGETS, Capability, find_target, format_capability
from flashvlm_export.tensorrt_api import Backend

# Largest resident memory of a build per byte of weights, and what a builder takes before it has read any: measured with
# TensorRT-RTX 1.7 on full-size graphs.
_MEMORY_PER_WEIGHT_BYTE = 3.5
_MEMORY_AT_REST_BYTES = 1 << 30


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
        overwrite: replace an engine for the same target and precision.
    """

    bundle: Path
    precision: Precision = Precision.FP16
    target: str | None = None
    backend: Backend | Literal["auto"] = "auto"
    profiles: Sequence[str] = ()
    build: BuildSettings = field(default_factory=BuildSettings)
    timing_cache: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Destination:
    """Where an engine is to run, and what builds it."""

    name: str
    backend: Backend
    capabilities: tuple[Capability, ...]
    note: str


def engine_from_bundle(settings: EngineSettings, progress: Progress | None = None) -> Engine:
    """Build an engine into the bundle and return it; on any error the bundle is as it was.

    Raises:
        BundleError, ConfigError, DependencyError, ExportError, StorageError: see their messages.
        TargetError: the engine has to be built on another machine; the message has the command.
    """
    progress = progress or Progress()
    bundle = Bundle.open(settings.bundle)
    destination = resolve_destination(settings, bundle, gpu_at_hand())
    graph = bundle.graph_file(settings.precision)
    spec = bundle.manifest.graphs[settings.precision.value].spec
    profiles = resolve_profiles(spec, settings.profiles)
    target = engine_file(bundle, destination.name, settings.precision)
    weights_bytes = sum(
        entry.size_bytes for name, entry in bundle.manifest.files.items() if name.startswith(graph.name)
    )
    _print_settings(settings, destination, profiles, weights_bytes, progress)
    with bundle_lock(bundle.path):
        if sidecar_of(target).exists() and not settings.overwrite:
            raise StorageError(
                "the bundle has an engine for this target and precision",
                received=target,
                expected="a new one, or --overwrite",
                hint="add --overwrite to replace it once the new one is whole, or remove it",
            )
        Bundle.open(bundle.path, verify=True)  # an engine of a damaged graph would be damaged for good
        _require_memory(weights_bytes)
        require_free_space(target, weights_bytes * len(destination.capabilities or (0,)))
        progress.step(f"building with {destination.backend}")
        start = time.perf_counter()
        with storage_errors(target):
            target.parent.mkdir(exist_ok=True)
            for leftover in target.parent.glob(".*.partial"):  # of a killed build: nobody else writes under the lock
                leftover.unlink()
            with atomic_write(target) as temporary:
                with temporary.open("wb") as output:
                    built = engine_from_onnx(
                        graph,
                        spec,
                        destination.backend,
                        output,
                        profiles=profiles,
                        capabilities=destination.capabilities,
                        settings=settings.build,
                        timing_cache=_read_cache(settings.timing_cache),
                        progress=progress,
                    )
                build_s = time.perf_counter() - start
                progress.step(f"writing {target}")
                digest, size_bytes = sha256_of(temporary), temporary.stat().st_size
                # From here to the sidecar's own writing, a kill leaves an engine that nothing lists.
                sidecar_of(target).unlink(missing_ok=True)
        entry = EngineEntry(
            schema_version=SCHEMA_VERSION,
            target=destination.name,
            backend=destination.backend,
            backend_version=str(tensorrt_api.load(destination.backend).__version__),
            compute_capabilities=[format_capability(capability) for capability in destination.capabilities],
            precision=settings.precision.value,
            graph_sha256=graph_fingerprint(bundle, settings.precision),
            engine_sha256=digest,
            size_bytes=size_bytes,
            profiles=[list(profile) for profile in profiles],
            settings=settings.build,
            build_s=round(build_s, 1),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            census=built.census,
        )
        write_entry(target, entry)
    if settings.timing_cache is not None and built.timing_cache is not None:
        with atomic_write(settings.timing_cache) as temporary:
            temporary.write_bytes(built.timing_cache)
    progress.step(f"engine written: {target}")
    return Engine(target, entry)


def resolve_destination(settings: EngineSettings, bundle: Bundle, gpu: Gpu | None) -> Destination:
    """Return where the engine is to run and what builds it; ``gpu`` is the one at hand.

    Raises:
        ConfigError: unknown target.
        DependencyError: the library that can build it is not installed.
        TargetError: it cannot be built on this machine.
    """
    if settings.target is None and gpu is None:
        portable = TARGETS[PORTABLE]
        note = "no GPU at hand: one portable TensorRT-RTX engine for " + portable.devices
        return _with_backend(settings, PORTABLE, portable.compute_capabilities, None, portable.machine, bundle, note)
    if settings.target is None and gpu is not None:
        name = f"sm{gpu.capability[0]}{gpu.capability[1]}"
        return _with_backend(settings, name, (gpu.capability,), gpu, platform.machine(), bundle, f"this {gpu.name}")
    target = find_target(settings.target or "")
    if settings.precision not in target.precisions:
        raise ConfigError(
            f"{target.devices} does not take this precision",
            received=settings.precision.value,
            expected=", ".join(precision.value for precision in target.precisions),
        )
    return _with_backend(
        settings, target.name, target.compute_capabilities, gpu, target.machine, bundle, target.devices
    )


def _with_backend(
    settings: EngineSettings,
    name: str,
    capabilities: tuple[Capability, ...],
    gpu: Gpu | None,
    machine: str,
    bundle: Bundle,
    note: str,
) -> Destination:
    is_at_hand = gpu is not None and capabilities == (gpu.capability,) and machine == platform.machine()
    compiles_ahead = machine == platform.machine() and set(capabilities) <= set(RTX_CAPABILITIES)
    possible: list[Backend] = []
    if is_at_hand:
        possible.append("tensorrt")
    if compiles_ahead:
        possible.append("tensorrt-rtx")
    wanted = [backend for backend in possible if settings.backend in ("auto", backend)]
    if not wanted:
        here = "no GPU" if gpu is None else f"{gpu.name}, compute capability {format_capability(gpu.capability)}"
        raise TargetError(
            f"an engine for {name} has to be built on that device",
            received=f"this machine: {platform.machine()}, {here}; --backend {settings.backend}",
            expected=f"{machine} with compute capability {', '.join(map(format_capability, capabilities))}",
            hint=f"copy {bundle.path} there and run: {build_command(bundle, settings.precision.value)}"
            " --backend tensorrt",
        )
    installed = [backend for backend in wanted if tensorrt_api.is_installed(backend)]
    if not installed:
        raise DependencyError(
            "no library that builds this engine is installed",
            expected=" or ".join(wanted),
            hint="in a clone of flashvlm-export: pip install '.[rtx]'"
            if "tensorrt-rtx" in wanted
            else "install TensorRT",
        )
    return Destination(name, installed[0], capabilities, note)


def _print_settings(
    settings: EngineSettings,
    destination: Destination,
    profiles: Sequence[Profile],
    weights_bytes: int,
    progress: Progress,
) -> None:
    build = settings.build
    progress.step(f"engine of {settings.bundle}, {settings.precision.value}")
    progress.note(f"target       {destination.name}: {destination.note}")
    progress.note(f"backend      {destination.backend}")
    if destination.backend == "tensorrt-rtx":
        progress.note(f"compiled for compute capability {', '.join(map(format_capability, destination.capabilities))}")
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
        f"{weights_bytes * len(destination.capabilities) / 1e9:.2f} GB of disk at most"
    )


def _memory_bytes(weights_bytes: int) -> int:
    return _MEMORY_AT_REST_BYTES + int(_MEMORY_PER_WEIGHT_BYTE * weights_bytes)


def _require_memory(weights_bytes: int) -> None:
    """Raise :class:`StorageError` where the build would be killed half-way."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    if available < _memory_bytes(weights_bytes):
        raise StorageError(
            "not enough memory to build this engine",
            received=f"{available / 1e9:.1f} GB available",
            expected=f"about {_memory_bytes(weights_bytes) / 1e9:.1f} GB",
            hint="stop other programs, add swap, or build on a machine with more",
        )


def _read_cache(file: Path | None) -> bytes | None:
    if file is None:
        return None
    return file.read_bytes() if file.is_file() else b""
