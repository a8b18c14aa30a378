"""A bundle that opens, with files of random bytes: for tests of the container, in no time and without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashvlm_export.bundle import Bundle, describe_files, write_manifest
from flashvlm_export.manifest import SCHEMA_VERSION, GraphEntry, Manifest, PromptSettings, Selection, Source
from flashvlm_export.specs import Precision, VisualDims, visual_graph_spec

FILES = {
    "visual.fp32.onnx": 700,
    "visual.fp32.onnx.data": 5000,
    "text_embeddings.npy": 900,
    "tokenizer.json": 300,
    "llm/model.onnx": 400,
}


def make_fake_bundle(path: Path, *, seed: int = 0) -> Bundle:
    """Write a bundle with one graph to ``path`` and open it."""
    rng = np.random.default_rng(seed)
    for name, size in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(rng.bytes(size))
    dims = VisualDims(image_size=28, patch_size=14, num_patches=4, vision_width=8, llm_width=6)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source("some/model", "llava", "checkpoint", "0" * 64, "1" * 64),
        dims=dims,
        selection=Selection("flashvlm", {"eta": 0.5}),
        graphs={"fp32": GraphEntry("visual.fp32.onnx", visual_graph_spec(dims, Precision.FP32))},
        vocab_size=10,
        prompt=PromptSettings("<image>", 9, "<s>", "</s>", [2], None),
        decoder=None,
        files=describe_files(path),
        tools={"flashvlm-export": "0"},
        checks={"fp32": {"parity": {"cases": 4}}},
    )
    write_manifest(path, manifest)
    return Bundle.open(path, verify=True)
