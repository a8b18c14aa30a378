"""Where TensorRT 10.3 to 11 and TensorRT-RTX differ for us; everything else uses what they have in common.

- The package is ``tensorrt`` or ``tensorrt_rtx``.
- ``NetworkDefinitionCreationFlag.STRONGLY_TYPED`` is bit 1 in TensorRT 10 and bit 0 in 11 and in TensorRT-RTX, which
  know no other networks.
- TensorRT builds for the GPU that it finds. TensorRT-RTX compiles ahead of time for a list of architectures.
- TensorRT-RTX times no kernels while it builds: its timing cache does nothing and is deprecated.
- TensorRT-RTX refits with ``REFIT``, TensorRT with ``REFIT_IDENTICAL`` too.
- Newer releases write an engine to a stream; the others return it whole.
- TensorRT-RTX captures CUDA graphs itself, when a context's configuration says so; with TensorRT the caller does.
- ``HardwareCompatibilityLevel`` and ``VERSION_COMPATIBLE`` belong to TensorRT; TensorRT-RTX has the names and no use
  for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from flashvlm_export import errors
from flashvlm_export.errors import ConfigError, DependencyError, ExportError
from flashvlm_export.targets import RTX_CAPABILITIES, Capability, format_capability

Backend = Literal["tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def as_backend(name: str) -> Backend:
    """Return ``name`` if it is a backend; raise :class:`ConfigError` if not."""
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise ConfigError("unknown backend", received=repr(name), expected=" or ".join(BACKENDS))


def install_hint(backend: Backend) -> str:
    """Return how to get the library of ``backend``."""
    if backend == "tensorrt-rtx":
        return errors.install_hint("rtx")
    return f"{errors.install_hint('tensorrt')}; on a Jetson it comes with JetPack: use --system-site-packages"


def is_installed(backend: Backend) -> bool:
    """Return whether the backend's package is there; nothing is imported."""
    return importlib.util.find_spec(_MODULES[backend]) is not None


def load(backend: Backend) -> Any:
    """Return the module of ``backend``.

    Raises:
        DependencyError: if it is not installed or its libraries do not load.
    """
    try:
        return importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as error:
        raise DependencyError(
            f"{backend} cannot be loaded",
            received=f"{type(error).__name__}: {error}",
            expected=f"the package {_MODULES[backend]}",
            hint=install_hint(backend),
        ) from error


def create_network(trt: Any, builder: Any) -> Any:
    """Return an empty strongly typed network: precision comes from the graph and nothing else."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def set_capabilities(trt: Any, config: Any, backend: Backend, capabilities: Sequence[Capability]) -> None:
    """Tell TensorRT-RTX which architectures to compile for; TensorRT builds for the GPU at hand.

    Raises:
        ConfigError: if TensorRT-RTX cannot compile for one of them.
    """
    if backend == "tensorrt":
        return
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = "SM{}{}".format(*capability)
        if not hasattr(trt.ComputeCapability, name):
            raise ConfigError(
                "TensorRT-RTX does not compile for this GPU",
                received=f"compute capability {format_capability(capability)}",
                expected=", ".join(map(format_capability, RTX_CAPABILITIES)),
            )
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def set_compatibility(trt: Any, config: Any, backend: Backend, *, version: bool, hardware: bool) -> None:
    """Switch on version and hardware compatibility.

    Raises:
        ConfigError: with TensorRT-RTX, whose engines are portable as they are, or on a Jetson, where TensorRT has no
            hardware compatibility.
    """
    if backend == "tensorrt-rtx" and (version or hardware):
        raise ConfigError(
            "TensorRT-RTX has no compatibility modes",
            received=", ".join(name for name, on in (("version", version), ("hardware", hardware)) if on),
            expected="neither: list the architectures with --target",
        )
    if hardware and platform.machine() == "aarch64":
        raise ConfigError("TensorRT has no hardware compatibility on a Jetson", expected="an engine for each device")
    if version:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if hardware:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def strip_weights(trt: Any, config: Any, backend: Backend) -> None:
    """Leave the weights out of the engine, to be refitted from the ONNX file."""
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    # Refitted with the same weights, TensorRT keeps all of its optimisations.
    config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL if backend == "tensorrt" else trt.BuilderFlag.REFIT)


def set_timing_cache(config: Any, backend: Backend, content: bytes | None) -> None:
    """Let a build start from the kernel timings of an earlier one, and record its own.

    Raises:
        ConfigError: if there is content and the backend has no use for it.
    """
    if backend == "tensorrt":
        config.set_timing_cache(config.create_timing_cache(content or b""), False)
    elif content is not None:
        raise ConfigError("TensorRT-RTX has no timing cache", expected="a build without one")


def get_timing_cache(config: Any, backend: Backend) -> bytes | None:
    """Return the kernel timings after a build, where the backend keeps any."""
    return bytes(config.get_timing_cache().serialize()) if backend == "tensorrt" else None


def build(trt: Any, builder: Any, network: Any, config: Any, output: BinaryIO) -> bool:
    """Build the engine and write it to ``output``; return whether there was one to write.

    Streamed where the library can, which spares a copy of the engine in memory.

    Raises:
        OSError: from ``output``.
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):
        memory = builder.build_serialized_network(network, config)
        if memory is not None:
            output.write(memory)
        return memory is not None
    problems: list[OSError] = []

    class Writer(trt.IStreamWriter):
        def write(self, data: bytes) -> int:
            # An exception must not fly through the library's frames; a short count ends the build.
            try:
                return output.write(data)
            except OSError as error:
                problems.append(error)
                return 0

    is_built = bool(builder.build_serialized_network_to_stream(network, config, Writer()))
    if problems:
        raise problems[0]
    return is_built


def parse(trt: Any, network: Any, file: Path, logger: Any, backend: Backend, *, instead: bytes | None = None) -> Any:
    """Parse an ONNX file into ``network`` and return the parser, which owns the weights.

    ``instead`` is a serialised graph to parse in the place of the file's; its weights lie where the file's do.

    Raises:
        ExportError: with the parser's messages.
    """
    parser = trt.OnnxParser(network, logger)
    if not (parser.parse_from_file(str(file)) if instead is None else parser.parse(instead, str(file))):
        messages = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ExportError(f"{backend} cannot parse {file.name}", received="; ".join(messages))
    return parser


def create_context(trt: Any, engine: Any, backend: Backend, *, cuda_graphs: bool) -> Any:
    """Return an execution context of ``engine``, or ``None`` where the GPU has no room for its activations."""
    if backend == "tensorrt" or not cuda_graphs:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)
