"""TensorRT and CUDA for machines without either: device memory is host memory, an engine is a session in NumPy.

Only what the runtime calls is here, with the names and meanings of TensorRT: addresses and shapes are set by tensor
name, the shape tensor is read where its host address points, and outputs are written to theirs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashvlm_export.specs import Array, Feeds, GraphSpec

Run = Callable[[Feeds], dict[str, Array]]


def fake_tensorrt(spec: GraphSpec, run: Run, version: str, *, loads: bool = True) -> Any:
    """Return a module whose engines compute ``run``; ``spec`` says what the tensors are."""

    class Context:
        def __init__(self) -> None:
            self.profile: int | None = None
            self.addresses: dict[str, int] = {}
            self.shapes: dict[str, tuple[int, ...]] = {"budget": ()}

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self.profile = index
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            feeds = {
                tensor.name: _at(self.addresses[tensor.name], self.shapes[tensor.name], tensor.dtype)
                for tensor in spec.inputs
            }
            for name, array in run(feeds).items():
                ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
            contexts_used.append(self.profile)
            return True

    contexts_used: list[int | None] = []
    engine = SimpleNamespace(create_execution_context=Context)
    return SimpleNamespace(
        __version__=version,
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda data: engine if loads else None),
        contexts_used=contexts_used,
    )


class FakeCuda:
    """``cuda.bindings.runtime`` with host memory; ``allocated`` holds what is not freed."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, memory_bytes: int = 1 << 40) -> None:
        self.memory_bytes = memory_bytes
        self.allocated: dict[int, Any] = {}
        self.streams = 0

    def cudaStreamCreate(self) -> tuple[int, int]:
        self.streams += 1
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
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
        ctypes.memmove(target, source, size)
        return (0,)


def _at(address: int, shape: tuple[int, ...], dtype: str) -> Array:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(address, count), dtype).reshape(shape)
