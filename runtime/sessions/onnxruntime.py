"""Graphs of a bundle in ONNX Runtime, on exactly the execution providers asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashvlm_export.errors import SessionError
from flashvlm_export.ort import ort_session
from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.specs import Array, Feeds, GraphSpec

_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}


class OnnxRuntimeGraph:
    """One ONNX file, loaded.

    Args:
        file: ONNX file of the bundle.
        spec: its contract.
        providers: execution providers in order of preference; the first one has to be available.
        threads: threads of one operator; ``None`` leaves it to ONNX Runtime.

    Raises:
        SessionError: if a provider is not there, or the file is not the graph of ``spec``.
    """

    def __init__(self, file: Path, spec: GraphSpec, providers: Sequence[str], threads: int | None) -> None:
        self._session: Any = ort_session(file, providers=providers, threads=threads)
        self._outputs = [tensor.name for tensor in spec.outputs]
        have = {value.name: (value.type, list(value.shape)) for value in self._session.get_inputs()}
        want = {tensor.name: (_ORT_TYPES[tensor.dtype], list(tensor.shape)) for tensor in spec.inputs}
        if have != want:
            raise SessionError(
                f"{file.name} is not the graph that the manifest describes",
                received=have,
                expected=want,
                hint="export the bundle again",
            )

    def run(self, feeds: Feeds) -> list[Array]:
        """Return the outputs in the order of the contract, which ``feeds`` have to follow."""
        outputs: list[Array] = self._session.run(self._outputs, dict(feeds))
        return outputs


class OnnxRuntimeSession(VisualSession):
    """Runs the fused graph in ``file``; arguments as of :class:`OnnxRuntimeGraph`."""

    name = "onnxruntime"

    def __init__(
        self,
        file: Path,
        spec: GraphSpec,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        super().__init__(spec)
        self.file = file
        self.providers = tuple(providers)
        self.threads = threads
        self._graph: OnnxRuntimeGraph | None = None

    def _open(self) -> None:
        self._graph = OnnxRuntimeGraph(self.file, self.spec, self.providers, self.threads)

    def _close(self) -> None:
        self._graph = None

    def _run(self, feeds: Feeds) -> VisualOutputs:
        assert self._graph is not None  # run() refuses closed sessions
        return VisualOutputs(*self._graph.run(feeds))
