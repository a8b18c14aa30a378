"""What only an NVIDIA GPU can show. Skips without one; ``FLASHVLM_REQUIRE_GPU=1`` makes that a failure."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashvlm_export.bundle import Bundle
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.specs import Precision


def require_cuda() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return
    reason = "ONNX Runtime has no CUDAExecutionProvider here (pip install 'flashvlm-export[cuda]', on an NVIDIA GPU)"
    if os.environ.get("FLASHVLM_REQUIRE_GPU"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_cuda_agrees_with_cpu(tiny_bundle: Path, precision: Precision) -> None:
    """Scores within the provider's rounding (TF32 matrix products: 2^-11), tokens of the same index likewise."""
    require_cuda()
    bundle = Bundle.open(tiny_bundle)
    spec, dims = bundle.manifest.graphs[precision.value].spec, bundle.manifest.dims
    rng = np.random.default_rng(0)
    dtype = np.dtype(precision.float_dtype)
    feeds = {
        "pixel_values": rng.standard_normal((2, 3, dims.image_size, dims.image_size), np.float32),
        "text_embeds": rng.standard_normal((2, 9, dims.llm_width), np.float32).astype(dtype),
        "text_mask": np.ones((2, 9), bool),
        "budget": np.array(dims.num_patches),
    }
    outputs = []
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        with OnnxRuntimeSession(bundle.graph_file(precision), spec, providers=(provider,)) as session:
            outputs.append(session.run(feeds))
    cpu, cuda = outputs
    np.testing.assert_array_equal(cpu.indices, cuda.indices)
    largest = np.abs(cpu.tokens).max()
    np.testing.assert_allclose(cuda.tokens.astype(np.float32), cpu.tokens.astype(np.float32), atol=0.02 * largest)
