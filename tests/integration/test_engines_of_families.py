"""Every family but LLaVA-1.5, whose engines have tests of their own, through calibration and TensorRT-RTX."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.engines import list_engines
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Request

# Matrix products of vision tower and projector, each with weights in INT8.
PRODUCTS = {
    # Three layers up to the feature layer with six products each, and two of the projector; of CLIP the query of the
    # CLS token, which is a product of its own.
    "next": 3 * 6 + 2 + 1,
    "onevision": 3 * 6 + 2,
    # Four blocks, of attention (two) and a gated feed-forward part (three), and the merger.
    "qwen": 4 * 5 + 2,
}


@pytest.mark.parametrize("family", PRODUCTS)
def test_engines_compile_in_fp16_and_int8(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines are compiled with TensorRT-RTX")
    given: Path = request.getfixturevalue(f"{family}_bundle")
    path = str(shutil.copytree(given, tmp_path / "bundle"))
    assert main(["calibrate", path, "--tolerance", "none"]) == 0
    for precision in ("fp16", "int8"):
        assert main(["build", path, "--precision", precision, "--target", "rtx-40"]) == 0
    bundle = Bundle.open(path)
    assert bundle.manifest.checks["int8"]["census"]["int8_products"] == PRODUCTS[family]
    census = {engine.entry.precision: engine.entry.census for engine in list_engines(bundle)}
    assert census.keys() == {"fp16", "int8"}
    for layers in census.values():  # the encoder in half precision or less, selection in none
        assert layers["TOPK FLOAT"] > 0
        assert "TOPK HALF" not in layers
    assert any("INT8" in name for name in census["int8"])
    assert not any("INT8" in name for name in census["fp16"])
    with Pipeline.open(bundle, precision="int8", llm=None) as vlm:
        prompt = vlm.encode([Request(["examples/scene.png"], "What is this?")], budget=6)[0]
    assert prompt.visual_tokens_kept == 6
