"""Opening ONNX Runtime sessions, for the visual graph and the decoder alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashvlm_export.errors import ConfigError, DependencyError, SessionError, install_hint

#: Execution providers by the name that options have. What TensorRT does not take of a graph, goes to CUDA.
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}

_EXTRA = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}


def ort_session(file: Path, *, providers: Sequence[str], threads: int | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` that runs on the providers asked for, or raise.

    Raises:
        DependencyError: if ONNX Runtime is not installed.
        SessionError: if a provider is not available or refuses the graph: ONNX Runtime would go on without it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            "ONNX Runtime is not installed",
            hint=f"{install_hint('ort')}, or '.[cuda]' for NVIDIA GPUs",
        ) from error
    available = onnxruntime.get_available_providers()
    missing = [provider for provider in providers if provider not in available]
    if missing or not providers:
        raise SessionError(
            "ONNX Runtime has no such execution provider here",
            received=", ".join(missing) or "none",
            expected=f"among {', '.join(available)}",
            hint=f"in a new environment, {install_hint(_EXTRA.get((missing or [''])[0], 'ort'))}",
        )
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise ConfigError("cannot use this many threads", received=threads, expected=f"1 to {cores}, the cores here")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise SessionError(
            f"ONNX Runtime cannot load {file.name}",
            received=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            hint="check the bundle: flashvlm inspect BUNDLE --verify",
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise SessionError(
            f"{providers[0]} could not be started and ONNX Runtime fell back to another provider",
            received=", ".join(session.get_providers()),
            expected=", ".join(providers),
            hint="check the driver and CUDA libraries, or ask for --provider cpu",
        )
    return session
