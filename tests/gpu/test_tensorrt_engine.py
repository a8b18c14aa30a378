"""Engines on a real GPU. Skips without one; ``FLASHVLM_REQUIRE_GPU=1`` makes that a failure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

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
        reason = "no NVIDIA GPU, or no cuda-python to ask for one"
    elif not tensorrt_api.is_installed(backend):
        reason = f"{backend} is not installed"
    elif backend == "tensorrt-rtx" and gpu.capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not compile for {gpu.name}")
    else:
        return
    if os.environ.get("FLASHVLM_REQUIRE_GPU"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_an_engine_agrees_with_onnx_runtime_on_a_cpu(
    tiny_bundle: Path, tmp_path: Path, backend: Backend, precision: Precision
) -> None:
    """Kept rows within TF32's and float16's rounding (2^-11) of those of the same index in ONNX Runtime."""
    require_backend(backend)
    from flashvlm_export.export.engine_from_bundle import EngineSettings, engine_from_bundle

    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    engine = engine_from_bundle(EngineSettings(bundle.path, precision, backend=backend))
    spec, dims = bundle.manifest.graphs[precision.value].spec, bundle.manifest.dims
    rng = np.random.default_rng(0)
    dtype = np.dtype(precision.float_dtype)
    feeds = {
        "pixel_values": rng.standard_normal((3, 3, dims.image_size, dims.image_size), np.float32),
        "text_embeds": rng.standard_normal((3, 9, dims.llm_width), np.float32).astype(dtype),
        "text_mask": np.ones((3, 9), bool),
    }
    with TensorRTSession(bundle, engine) as session, OnnxRuntimeSession(bundle.graph_file(precision), spec) as cpu:
        everything = cpu.run({**feeds, "budget": np.array(dims.num_patches)}).tokens.astype(np.float32)
        for budget in (1, 6, dims.num_patches):
            have = session.run({**feeds, "budget": np.array(budget)})
            want = np.take_along_axis(everything, have.indices[:, :, None], axis=1)
            np.testing.assert_allclose(
                have.tokens.astype(np.float32), want, rtol=0, atol=0.02 * np.abs(everything).max()
            )
            assert (np.diff(have.indices) > 0).all()
