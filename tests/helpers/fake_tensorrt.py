"""TensorRT and CUDA for machines without either: device memory is host memory, an engine is a session in NumPy.

TensorRT has the names and signatures of a recorded release (``recorded_tensorrt.py``); only what a context does is
given here: addresses and shapes are set by tensor name, the shape tensor is read where its host address points, and
outputs are written to theirs. While CUDA captures a stream, nothing runs; a captured graph runs what was put there,
with the addresses and shapes of then.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashvlm_export.specs import Array, Feeds, GraphSpec
from helpers.recorded_tensorrt import recorded_module

Run = Callable[[Feeds], dict[str, Array]]
SURFACES = Path(__file__).parents[1] / "data" / "tensorrt"
RELEASES = tuple(sorted(file.stem for file in SURFACES.glob("*.json")))


def surface(version: str) -> Any:
    """Return what a recorded release offers."""
    return json.loads((SURFACES / f"{version}.json").read_text())


def fake_tensorrt(spec: GraphSpec, run: Run, version: str, cuda: FakeCuda, *, loads: bool = True) -> Any:
    """Return a recorded release whose engines compute ``run``; ``spec`` says what the tensors are.

    ``contexts_used`` of the module lists the profile of each run.
    """

    def create_context(engine: Any) -> Any:
        context = module.IExecutionContext.__new__(module.IExecutionContext)
        context.__dict__.update(profile=None, addresses={}, shapes={"budget": ()})
        return context

    def set_profile(context: Any, index: int, stream: int) -> bool:
        context.__dict__["profile"] = index
        return True

    def set_shape(context: Any, name: str, shape: tuple[int, ...]) -> bool:
        context.__dict__["shapes"][name] = tuple(shape)
        return True

    def set_address(context: Any, name: str, address: int) -> bool:
        context.__dict__["addresses"][name] = address
        return True

    def execute(context: Any, stream: int) -> bool:
        state = context.__dict__
        profile, addresses, shapes = state["profile"], dict(state["addresses"]), dict(state["shapes"])

        def kernels() -> None:
            feeds = {
                tensor.name: _at(addresses[tensor.name], shapes[tensor.name], tensor.dtype) for tensor in spec.inputs
            }
            for name, array in run(feeds).items():
                ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
            module.contexts_used.append(profile)

        return cuda.launch(stream, kernels)

    behaviour = {
        "Runtime.deserialize_cuda_engine": lambda runtime, data: _new(module.ICudaEngine) if loads else None,
        "ICudaEngine.create_execution_context": create_context,
        "IExecutionContext.set_optimization_profile_async": set_profile,
        "IExecutionContext.set_input_shape": set_shape,
        "IExecutionContext.set_tensor_address": set_address,
        "IExecutionContext.execute_async_v3": execute,
    }
    module = recorded_module(surface(version), behaviour)
    module.contexts_used = []
    return module


class FakeCuda:
    """``cuda.bindings.runtime`` with host memory; ``allocated``, ``streams`` and ``graphs`` hold what is not freed.

    What is put on a stream waits until the stream is synchronised, as on a GPU that is busy. While a stream is
    captured, nothing of it runs.

    Args:
        memory_bytes: of the device.
        captures: whether kernels can be captured.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self, memory_bytes: int = 1 << 40, *, captures: bool = True) -> None:
        self.memory_bytes = memory_bytes
        self.captures = captures
        self.allocated: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.graphs: list[Any] = []
        self.replays = 0
        self.before_kernels: Callable[[], None] = lambda: None
        self._captured: dict[int, list[Callable[[], None]]] = {}
        self._numbers = itertools.count(7)

    def launch(self, stream: int, kernels: Callable[[], None]) -> bool:
        """Put ``kernels`` on the stream, or into its capture; return whether that worked."""
        if stream in self._captured and not self.captures:
            return False
        self._put(stream, kernels)
        return True

    def _put(self, stream: int, work: Callable[[], None]) -> None:
        (self._captured if stream in self._captured else self.streams)[stream].append(work)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self._captured[stream] = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        graph = self._captured.pop(stream)
        return (0, graph) if self.captures else (901, None)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        self.graphs.append(graph)
        return 0, graph

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (0,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[int]:
        self.graphs.remove(graph)
        return (0,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        for kernels in graph:
            self._put(stream, kernels)
        self.replays += 1
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        number = next(self._numbers)
        self.streams[number] = []
        return 0, number

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        del self.streams[stream]
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if stream in self._captured:
            return (900,)
        if self.streams[stream]:
            self.before_kernels()
        while self.streams[stream]:
            self.streams[stream].pop(0)()
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if sum(map(len, self.allocated.values())) + size > self.memory_bytes:
            return 2, 0
        buffer = ctypes.create_string_buffer(size)
        self.allocated[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.allocated[pointer]
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        device = target if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        if size > len(self.allocated[device]):
            return (1,)
        self._put(stream, lambda: ctypes.memmove(target, source, size) and None)
        return (0,)


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


def _at(address: int, shape: tuple[int, ...], dtype: str) -> Array:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(address, count), dtype).reshape(shape)
