"""The visual graph in ONNX Runtime, on exactly the execution providers asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashvlm_export.errors import SessionError
from flashvlm_export.ort import ort_session
from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.specs import VISUAL_OUTPUTS, Feeds, GraphSpec

_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}


class OnnxRuntimeSession(VisualSession):
    """Runs ``file`` with ONNX Runtime.

    Args:
        file: ONNX file of the bundle.
        spec: its contract.
        providers: execution providers in order of preference; the first one has to be available.
        threads: threads of one operator; ``None`` leaves it to ONNX Runtime.
    """

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
        self._session: Any = None

    def _open(self) -> None:
        session = ort_session(self.file, providers=self.providers, threads=self.threads)
        have = {value.name: (value.type, list(value.shape)) for value in session.get_inputs()}
        want = {tensor.name: (_ORT_TYPES[tensor.dtype], list(tensor.shape)) for tensor in self.spec.inputs}
        if have != want:
            raise SessionError(
                f"{self.file.name} is not the graph that the manifest describes",
                received=have,
                expected=want,
                hint="export the bundle again",
            )
        self._session = session

    def _close(self) -> None:
        self._session = None

    def _run(self, feeds: Feeds) -> VisualOutputs:
        return VisualOutputs(*self._session.run(VISUAL_OUTPUTS, dict(feeds)))
