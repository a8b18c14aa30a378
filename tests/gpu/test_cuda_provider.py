"""What only an NVIDIA GPU can show. Skips without one; ``FLASHVLM_REQUIRE_GPU=1`` makes that a failure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.gpu import lacking, noise

from flashvlm_export.bundle import Bundle
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.specs import Precision


def require_cuda() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return
    lacking("ONNX Runtime has no CUDAExecutionProvider here (the extra 'cuda', on an NVIDIA GPU)")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("budget", [2, 6, 11])
def test_cuda_agrees_with_cpu(tiny_bundle: Path, precision: Precision, budget: int) -> None:
    """Tokens of the same index within the provider's rounding, and most of the important half of the kept set.

    TF32 and float16 products round at 2^-11; sharpening multiplies that by up to 250, so close scores may change
    places: at least three of four important tokens have to be the same.
    """
    require_cuda()
    bundle = Bundle.open(tiny_bundle)
    spec, dims = bundle.manifest.graphs[precision.value].spec, bundle.manifest.dims
    feeds = noise(bundle, precision, batch=4)
    outputs = {}
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        with OnnxRuntimeSession(bundle.graph_file(precision), spec, providers=(provider,)) as session:
            outputs[provider] = session.run({**feeds, "budget": np.array(budget)})
            everything = session.run({**feeds, "budget": np.array(dims.num_patches)})
        if provider == "CPUExecutionProvider":
            all_tokens = everything.tokens.astype(np.float32)
    cpu, cuda = outputs.values()
    expected = np.take_along_axis(all_tokens, cuda.indices[:, :, None], axis=1)
    np.testing.assert_allclose(cuda.tokens.astype(np.float32), expected, rtol=0, atol=0.02 * np.abs(expected).max())
    best = np.argsort(-cpu.scores, axis=1, kind="stable")[:, : budget // 2]
    same = sum(np.isin(row, kept).sum() for row, kept in zip(best, cuda.indices, strict=True))
    assert same >= 0.75 * best.size
