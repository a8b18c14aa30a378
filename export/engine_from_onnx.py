"""ONNX file → engine: the one builder for TensorRT 10.3 to 11 and TensorRT-RTX. Importing it needs no torch and no GPU.

TensorRT needs the GPU that the engine is for; TensorRT-RTX compiles ahead of time on any machine.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flashvlm_export import interrupts, tensorrt_api
from flashvlm_export.engines import BuildSettings
from flashvlm_export.errors import ExportError
from flashvlm_export.profiles import Profile
from flashvlm_export.progress import Progress
from flashvlm_export.specs import GraphSpec
from flashvlm_export.targets import Capability
from flashvlm_export.tensorrt_api import Backend

# An interrupt must not fly through the library's frames: ``interrupts`` remembers it, and the next step ends the build.
_REMEMBERED = contextlib.suppress(KeyboardInterrupt)


@dataclass(frozen=True)
class BuildReport:
    """What a build leaves besides the engine.

    Attributes:
        census: outputs of the network's layers by type and dtype. The network is strongly typed, so the engine computes
            in these types.
        timing_cache: what was learnt about kernels, for the next build; ``None`` where the backend keeps none.
    """

    census: dict[str, int]
    timing_cache: bytes | None


def engine_from_onnx(
    file: Path,
    spec: GraphSpec,
    backend: Backend,
    output: BinaryIO,
    *,
    profiles: Sequence[Profile],
    instead: bytes | None = None,
    capabilities: Sequence[Capability] = (),
    settings: BuildSettings | None = None,
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Write the serialised engine of ``file``, strongly typed, to ``output``.

    Args:
        file: ONNX graph; external weights beside it.
        spec: its contract: which inputs have which dynamic dimensions.
        backend: library that builds.
        output: where the engine goes, piece by piece.
        profiles: one or more; each names the range of every dynamic dimension.
        instead: a serialised graph in the place of the file's, on the file's weights.
        capabilities: GPUs to compile for, with TensorRT-RTX.
        settings: how to build.
        timing_cache: of an earlier build with the same library version and GPU.
        progress: shows a bar.

    Raises:
        DependencyError: if the backend is not installed.
        ConfigError: if the backend cannot build so.
        ExportError: if the parser or the builder rejects the graph, with their messages.
        OSError: from ``output``.
    """
    settings = settings or BuildSettings()
    trt = tensorrt_api.load(backend)
    log = _make_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise ExportError(f"{backend} found no GPU that it can build for", received="; ".join(log.errors))
    network = tensorrt_api.create_network(trt, builder)
    parser = tensorrt_api.parse(trt, network, file, log, backend, instead=instead)
    config = builder.create_builder_config()
    for ranges in profiles:
        config.add_optimization_profile(_profile(builder.create_optimization_profile(), spec, ranges))
    tensorrt_api.set_capabilities(trt, config, backend, capabilities)
    tensorrt_api.set_compatibility(
        trt, config, backend, version=settings.version_compatible, hardware=settings.hardware_compatible
    )
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.strip_weights:
        tensorrt_api.strip_weights(trt, config, backend)
    tensorrt_api.set_timing_cache(config, backend, timing_cache)
    census = _census(network)
    monitor = _make_monitor(trt, progress or Progress())
    config.progress_monitor = monitor
    try:
        is_built = tensorrt_api.build(trt, builder, network, config, output)
    finally:
        monitor.close()
    del parser  # held the weights until here
    interrupts.check()
    if not is_built:
        raise ExportError(
            f"{backend} cannot compile {file.name}",
            received="; ".join(log.errors),
            hint="build with the weights inside: TensorRT-RTX 1.7 needs a GPU to leave them out of this graph"
            if settings.strip_weights
            else None,
        )
    return BuildReport(census, tensorrt_api.get_timing_cache(config, backend))


def _give_freed_memory_back() -> None:
    """Have glibc return what was freed to the system; other C libraries do so by themselves.

    What the compiler frees between its phases would stay with the process: at the peak of a full-size build, a third of
    the engine's size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _profile(profile: Any, spec: GraphSpec, ranges: Profile) -> Any:
    """Fill ``profile``: sizes of each input, and for the shape tensor ``budget`` its values."""
    dims = {dim.name: dim for dim in ranges}
    for tensor in spec.inputs:
        if tensor.name == "budget":
            budget = dims["budget"]
            profile.set_shape_input(tensor.name, [budget.min], [budget.opt], [budget.max])
        else:
            sizes = [
                [getattr(dims[size], bound) if isinstance(size, str) else size for size in tensor.shape]
                for bound in ("min", "opt", "max")
            ]
            profile.set_shape(tensor.name, *sizes)
    return profile


def _census(network: Any) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            counts[f"{layer.type.name} {layer.get_output(output).dtype.name}"] += 1
    return dict(sorted(counts.items()))


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps what went wrong; the rest is of no use to whoever builds."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            with _REMEMBERED:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    self.errors.append(message)

    return Log()


def _make_monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """One bar over the steps of all phases, which become known as the build goes on."""

        def __init__(self) -> None:
            super().__init__()
            self._bar = progress.bar(0, "build", " steps")

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with _REMEMBERED:
                self._bar.total = (self._bar.total or 0) + steps
                self._bar.set_postfix_str(name)

        def step_complete(self, name: str, step: int) -> bool:
            with _REMEMBERED:
                self._bar.update()
                interrupts.check()
                return True
            return False

        def phase_finish(self, name: str) -> None:
            with _REMEMBERED:
                self._bar.refresh()
                _give_freed_memory_back()

        def close(self) -> None:
            self._bar.close()

    return Monitor()
