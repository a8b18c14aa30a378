"""What the tests that need a GPU share."""

from __future__ import annotations

import os
from typing import NoReturn

import numpy as np
import pytest

from flashvlm_export.bundle import Bundle
from flashvlm_export.specs import Array, Precision


def lacking(reason: str) -> NoReturn:
    """Skip with ``reason``; with ``FLASHVLM_REQUIRE_GPU=1``, fail: a GPU lane must not pass by skipping."""
    if os.environ.get("FLASHVLM_REQUIRE_GPU"):
        pytest.fail(reason)
    pytest.skip(reason)


def noise(bundle: Bundle, precision: Precision, batch: int) -> dict[str, Array]:
    """Return inputs of the visual graph but for the budget: ``batch`` images of noise, nine text tokens each."""
    dims, rng = bundle.manifest.dims, np.random.default_rng(0)
    return {
        "pixel_values": rng.standard_normal((batch, 3, dims.image_size, dims.image_size), np.float32),
        "text_embeds": rng.standard_normal((batch, 9, dims.llm_width), np.float32).astype(precision.float_dtype),
        "text_mask": np.ones((batch, 9), bool),
    }
