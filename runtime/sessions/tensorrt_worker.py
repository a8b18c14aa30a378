"""What one call at a time needs of a TensorRT engine: a stream, device buffers, and execution contexts.

Device buffers are allocated once, for the largest sizes of the profiles, and used for every run. The budget is a shape
tensor: TensorRT reads it in host memory before the run, because it decides the size of outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flashvlm_export.errors import DependencyError, SessionError, install_hint
from flashvlm_export.profiles import Profile, format_profile
from flashvlm_export.runtime.sessions.base import VisualOutputs
from flashvlm_export.specs import Array, Feeds, GraphSpec, TensorSpec

# CUDA graphs kept per worker; each holds a context with memory for its activations.
MOST_GRAPHS = 8


class TensorRTWorker:
    """Runs an engine, one call at a time.

    Args:
        spec: the graph's contract.
        profiles: of the engine, in its order.
        create_context: makes a context of the engine; ``None`` where the GPU has no room.
        captures: capture and replay a CUDA graph for each combination of sizes.

    Raises:
        DependencyError: without cuda-python.
        SessionError: if the GPU has no room.
    """

    def __init__(
        self, spec: GraphSpec, profiles: Sequence[Profile], create_context: Callable[[], Any], *, captures: bool = False
    ) -> None:
        self.spec = spec
        self.profiles = profiles
        self.captures = captures
        self._create_context = create_context
        # A captured graph holds its context's shapes and memory, and the host address of its budget.
        self._graphs: OrderedDict[tuple[int, ...], tuple[Any, Any, Array]] = OrderedDict()
        self._device = _Device(capacities(spec, profiles))
        try:
            # One context per profile: to change the profile of one is a synchronisation.
            self._contexts = [self._context(index) for index in range(len(profiles))]
        except BaseException:
            self._device.close()
            raise

    def run(self, profile: int, sizes: Mapping[str, int], feeds: Feeds) -> VisualOutputs:
        """Run with ``feeds``, whose ``sizes``, the budget among them, lie in ``profile``.

        Raises:
            SessionError: if TensorRT or CUDA refuses.
        """
        host = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name != "budget"}
        host["budget"] = np.array(feeds["budget"], np.int64)  # a captured graph keeps it; the caller's may change
        for name, array in host.items():
            if name != "budget":
                self._device.upload(name, array)
        self._enqueue(profile, sizes, host)
        outputs = {tensor.name: np.empty(output_shape(tensor, sizes), tensor.dtype) for tensor in self.spec.outputs}
        for name, array in outputs.items():
            self._device.download(name, array)
        self._device.synchronize()
        return VisualOutputs(outputs["visual_tokens"], outputs["visual_indices"], outputs["scores"])

    def close(self) -> None:
        """Free everything on the device."""
        try:
            while self._graphs:
                self._forget_oldest()
        finally:
            self._contexts.clear()
            self._device.close()

    def _enqueue(self, profile: int, sizes: Mapping[str, int], host: Mapping[str, Array]) -> None:
        if not self.captures:
            self._launch(self._contexts[profile], host)
            return
        key = (profile, *sizes.values())
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._device.replay(self._graphs[key][0])
            return
        if len(self._graphs) == MOST_GRAPHS:
            self._forget_oldest()
        context = self._context(profile)
        self._launch(context, host)  # TensorRT settles a context's shapes in a first run, which cannot be captured
        graph = self._device.capture(lambda: self._launch(context, host))
        self._graphs[key] = (graph, context, host["budget"])

    def _launch(self, context: Any, host: Mapping[str, Array]) -> None:
        is_well = True
        for name, array in host.items():
            if name == "budget":
                is_well &= context.set_tensor_address(name, array.ctypes.data)
            else:
                is_well &= context.set_input_shape(name, array.shape)
                is_well &= context.set_tensor_address(name, self._device.pointer(name))
        for tensor in self.spec.outputs:
            is_well &= context.set_tensor_address(tensor.name, self._device.pointer(tensor.name))
        # After a shape that was refused the context would run with the one before.
        if not (is_well and context.execute_async_v3(self._device.stream_handle)):
            raise SessionError(
                "the engine could not be run",
                received=", ".join(f"{name} {list(array.shape)}" for name, array in host.items()),
                hint="see the messages above",
            )

    def _context(self, profile: int) -> Any:
        context = self._create_context()
        stream = self._device.stream_handle
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise SessionError(
                "the GPU has no room for the engine's activations",
                received=f"profile {format_profile(self.profiles[profile])}",
                hint="build with smaller profiles, or close other programs on the GPU",
            )
        self._device.synchronize()
        return context

    def _forget_oldest(self) -> None:
        _, (graph, _, _) = self._graphs.popitem(last=False)
        self._device.destroy(graph)


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
        self._stream = self._call(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
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

    def upload(self, name: str, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync(self.pointer(name), array.ctypes.data, array.nbytes, kind, self._stream))

    def download(self, name: str, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync(array.ctypes.data, self.pointer(name), array.nbytes, kind, self._stream))

    def synchronize(self) -> None:
        self._call(self._cuda.cudaStreamSynchronize(self._stream))

    def capture(self, launch: Callable[[], None]) -> Any:
        """Return what ``launch`` puts on the stream as a CUDA graph; nothing of it is run.

        Raises:
            SessionError: if the engine does what a graph cannot hold.
        """
        cuda = self._cuda
        self._call(
            cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        try:
            try:
                launch()
            finally:
                # Whatever happened: it takes the stream out of its capture.
                error, graph = cuda.cudaStreamEndCapture(self._stream)
            self._call((error,))
        except SessionError as problem:
            raise SessionError(
                "this engine cannot be captured as a CUDA graph",
                received=problem.received,
                hint="run it without CUDA graphs: leave out --cuda-graphs",
            ) from problem
        try:
            return self._call(cuda.cudaGraphInstantiate(graph, 0))
        finally:
            self._call(cuda.cudaGraphDestroy(graph))

    def replay(self, graph: Any) -> None:
        self._call(self._cuda.cudaGraphLaunch(graph, self._stream))

    def destroy(self, graph: Any) -> None:
        self._call(self._cuda.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        """Free everything; the first error of CUDA is raised when that is done."""
        cuda = self._cuda
        results = [cuda.cudaFree(pointer) for pointer in self._buffers.values()]
        self._buffers.clear()
        if self._stream is not None:
            results.append(cuda.cudaStreamDestroy(self._stream))
            self._stream = None
        for result in results:
            self._call(result)

    def _call(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if int(error) != 0:
            raise SessionError(
                "the CUDA runtime reports an error",
                received=str(error),
                hint="if memory is short, build with smaller profiles or close other programs on the GPU",
            )
        return values[0] if values else None
