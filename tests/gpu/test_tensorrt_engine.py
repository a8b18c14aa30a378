"""Engines on a real GPU. Skips without one; ``FLASHVLM_REQUIRE_GPU=1`` makes that a failure."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.gpu import lacking, noise

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.gpu import gpu_at_hand
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.runtime.sessions.tensorrt import TensorRTSession
from flashvlm_export.specs import Precision
from flashvlm_export.targets import RTX_CAPABILITIES
from flashvlm_export.tensorrt_api import BACKENDS, Backend


def require_backend(backend: Backend) -> None:
    gpu = gpu_at_hand()
    if gpu is None:
        lacking("no NVIDIA GPU, or no cuda-python to ask for one")
    if not tensorrt_api.is_installed(backend):
        lacking(f"{backend} is not installed")
    if backend == "tensorrt-rtx" and gpu.capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not compile for {gpu.name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_an_engine_agrees_with_onnx_runtime_on_a_cpu(
    tiny_bundle: Path, tmp_path: Path, backend: Backend, precision: Precision
) -> None:
    """Kept rows within TF32's and float16's rounding (2^-11) of those of the same index in ONNX Runtime."""
    require_backend(backend)
    from helpers.comparing import require_close  # Polygraphy comes with the extras of both backends

    from flashvlm_export.export.engine_from_bundle import EngineSettings, engine_from_bundle

    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    engine = engine_from_bundle(EngineSettings(bundle.path, precision, backend=backend))
    spec, dims = bundle.manifest.graphs[precision.value].spec, bundle.manifest.dims
    feeds = noise(bundle, precision, batch=3)
    with TensorRTSession(bundle, engine) as session, OnnxRuntimeSession(bundle.graph_file(precision), spec) as cpu:
        everything = cpu.run({**feeds, "budget": np.array(dims.num_patches)}).tokens.astype(np.float32)
        for budget in (1, 6, dims.num_patches):
            have = session.run({**feeds, "budget": np.array(budget)})
            want = np.take_along_axis(everything, have.indices[:, :, None], axis=1)
            tokens = have.tokens.astype(np.float32)
            require_close({"tokens": want}, {"tokens": tokens}, atol=0.02 * float(np.abs(everything).max()))
            assert (np.diff(have.indices) > 0).all()
