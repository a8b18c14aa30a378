"""The visual graph as a TensorRT or TensorRT-RTX engine.

Device buffers are allocated once, for the largest sizes of the profiles, and used for every run. The budget is a shape
tensor: TensorRT reads it in host memory before the run, because it decides the size of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import Engine, EngineEntry, build_command, check_engine
from flashvlm_export.errors import DependencyError, SessionError, install_hint
from flashvlm_export.gpu import Gpu, gpu_at_hand
from flashvlm_export.profiles import Profile, format_profile
from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.specs import Array, Feeds, GraphSpec, Precision, TensorSpec
from flashvlm_export.targets import format_capability


class TensorRTSession(VisualSession):
    """Runs an engine of ``bundle`` on the first GPU. Not thread-safe: one session per thread.

    Args:
        bundle: the opened bundle; the engine has to belong to its graph.
        engine: from :func:`flashvlm_export.engines.find_engine`.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        super().__init__(bundle.manifest.graphs[engine.entry.precision].spec)
        self.bundle = bundle
        self.engine = engine
        self.profiles = [tuple(profile) for profile in engine.entry.profiles]
        self._contexts: list[Any] = []
        self._loaded: Any = None

    def _open(self) -> None:
        entry = self.engine.entry
        check_engine(self.bundle, self.engine)
        trt = tensorrt_api.load(tensorrt_api.as_backend(entry.backend))
        rebuild = f"{build_command(self.bundle, entry.precision, entry.target)} --overwrite"
        require_fit(entry, str(trt.__version__), gpu_at_hand(), rebuild)
        self._device = _Device(capacities(self.spec, self.profiles))
        try:
            self._load(trt, rebuild)
        except BaseException:
            self._close()
            raise

    def _load(self, trt: Any, rebuild: str) -> None:
        entry = self.engine.entry
        self._logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(self._logger)
        if entry.settings.version_compatible:
            runtime.engine_host_code_allowed = True
        self._loaded = runtime.deserialize_cuda_engine(self.engine.file.read_bytes())
        if self._loaded is None:
            raise SessionError(f"{entry.backend} cannot load the engine", received=self.engine.file, hint=rebuild)
        if entry.settings.strip_weights:
            self._refit(trt, rebuild)
        # One context per profile: to change the profile of one is a synchronisation.
        for index in range(len(self.profiles)):
            context = self._loaded.create_execution_context()
            if context is None:
                raise SessionError(
                    "the GPU has no room for the engine's activations",
                    received=f"profile {format_profile(self.profiles[index])}",
                    hint="build with smaller profiles, or close other programs on the GPU",
                )
            context.set_optimization_profile_async(index, self._device.stream_handle)
            self._contexts.append(context)
        self._device.synchronize()

    def _refit(self, trt: Any, rebuild: str) -> None:
        """Put the weights of the ONNX file into an engine that was built without."""
        refitter = trt.Refitter(self._loaded, self._logger)
        graph = self.bundle.graph_file(Precision(self.engine.entry.precision))
        if not trt.OnnxParserRefitter(refitter, self._logger).refit_from_file(str(graph)):
            raise SessionError("the engine does not take the weights of the graph", received=graph, hint=rebuild)
        if not refitter.refit_cuda_engine():
            raise SessionError("the engine lacks weights after refitting", received=graph, hint=rebuild)

    def _close(self) -> None:
        self._contexts.clear()
        self._loaded = None
        self._device.close()

    def _run(self, feeds: Feeds) -> VisualOutputs:
        sizes = {
            "batch": len(feeds["pixel_values"]),
            "text": feeds["text_embeds"].shape[1],
            "budget": int(feeds["budget"]),
        }
        command = build_command(self.bundle, self.engine.entry.precision, self.engine.entry.target)
        context = self._contexts[choose_profile(self.profiles, sizes, command)]
        host = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in host.items():
            if name == "budget":
                context.set_tensor_address(name, array.ctypes.data)
            else:
                context.set_input_shape(name, array.shape)
                context.set_tensor_address(name, self._device.upload(name, array))
        outputs = {tensor.name: np.empty(output_shape(tensor, sizes), tensor.dtype) for tensor in self.spec.outputs}
        for name in outputs:
            context.set_tensor_address(name, self._device.pointer(name))
        if not context.execute_async_v3(self._device.stream_handle):
            raise SessionError("the engine could not be run", received=sizes, hint="see the messages above")
        for name, array in outputs.items():
            self._device.download(name, array)
        self._device.synchronize()
        return VisualOutputs(outputs["visual_tokens"], outputs["visual_indices"], outputs["scores"])


def require_fit(entry: EngineEntry, version: str, gpu: Gpu | None, rebuild: str) -> None:
    """Raise :class:`SessionError` unless this library version and this GPU can run the engine.

    TensorRT refuses an engine of any other version; version-compatible ones run on later releases of the same major
    version. TensorRT-RTX may run on architectures that an engine does not name; that was not tried, so it is refused.
    """
    if gpu is None:
        raise SessionError(
            "there is no NVIDIA GPU to run the engine on",
            expected=f"compute capability {', '.join(entry.compute_capabilities)}, its driver, and cuda-python",
            hint="run the bundle with ONNX Runtime: leave out --engine",
        )
    if format_capability(gpu.capability) not in entry.compute_capabilities and not entry.settings.hardware_compatible:
        raise SessionError(
            "the engine was built for another GPU",
            received=f"{gpu.name}, compute capability {format_capability(gpu.capability)}",
            expected=", ".join(entry.compute_capabilities),
            hint=f"build one for this GPU: {rebuild}",
        )
    same_major = version.split(".")[0] == entry.backend_version.split(".")[0]
    if version != entry.backend_version and not (entry.settings.version_compatible and same_major):
        raise SessionError(
            f"the engine was built with another version of {entry.backend}",
            received=version,
            expected=entry.backend_version,
            hint=f"build it again with this version: {rebuild}",
        )


def choose_profile(profiles: Sequence[Profile], sizes: Mapping[str, int], command: str) -> int:
    """Return the index of the first profile that holds ``sizes``, or raise :class:`SessionError`."""
    for index, profile in enumerate(profiles):
        if all(dim.min <= sizes[dim.name] <= dim.max for dim in profile):
            return index
    ranges = " --profile ".join(format_profile(profile) for profile in profiles)
    raise SessionError(
        "no profile of the engine holds these sizes",
        received=", ".join(f"{name} {size}" for name, size in sizes.items()),
        expected=" or ".join(format_profile(profile) for profile in profiles),
        hint=f"build with wider ranges: {command} --profile {ranges} --overwrite",
    )


def output_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of an output; ``kept`` is the budget."""
    named = {**sizes, "kept": sizes["budget"]}
    return tuple(named[size] if isinstance(size, str) else size for size in tensor.shape)


def capacities(spec: GraphSpec, profiles: Sequence[Profile]) -> dict[str, int]:
    """Return bytes of each device buffer: the largest that any profile lets a tensor become."""
    largest = {dim.name: max(d.max for profile in profiles for d in profile if d.name == dim.name) for dim in spec.dims}
    return {
        tensor.name: int(np.prod(output_shape(tensor, largest))) * np.dtype(tensor.dtype).itemsize
        for tensor in (*spec.inputs, *spec.outputs)
        if tensor.name != "budget"
    }


class _Device:
    """One stream and one buffer per tensor, all allocated at once and freed at once."""

    def __init__(self, sizes_bytes: Mapping[str, int]) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise DependencyError(
                "engines need cuda-python",
                received=str(error),
                hint=install_hint("tensorrt"),
            ) from error
        self._cuda = runtime
        self._buffers: dict[str, int] = {}
        self._stream = self._call(runtime.cudaStreamCreate())
        try:
            for name, size in sizes_bytes.items():
                self._buffers[name] = int(self._call(runtime.cudaMalloc(size)))
        except SessionError:
            self.close()
            raise

    @property
    def stream_handle(self) -> int:
        return int(self._stream)

    def pointer(self, name: str) -> int:
        return self._buffers[name]

    def upload(self, name: str, array: Array) -> int:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        pointer = self._buffers[name]
        self._call(self._cuda.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self._stream))
        return pointer

    def download(self, name: str, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        pointer = self._buffers[name]
        self._call(self._cuda.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self._stream))

    def synchronize(self) -> None:
        self._call(self._cuda.cudaStreamSynchronize(self._stream))

    def close(self) -> None:
        for pointer in self._buffers.values():
            self._call(self._cuda.cudaFree(pointer))
        self._buffers.clear()
        if self._stream is not None:
            self._call(self._cuda.cudaStreamDestroy(self._stream))
            self._stream = None

    def _call(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if int(error) != 0:
            raise SessionError(
                "the CUDA runtime reports an error",
                received=str(error),
                hint="if memory is short, build with smaller profiles or close other programs on the GPU",
            )
        return values[0] if values else None
