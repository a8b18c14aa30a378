"""A bundle that opens, with files of random bytes: for tests of the container, in no time and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashvlm_export.bundle import Bundle, describe_files, write_manifest
from flashvlm_export.engines import SCHEMA_VERSION as ENGINE_SCHEMA_VERSION
from flashvlm_export.engines import BuildSettings, EngineEntry, engine_file, write_entry
from flashvlm_export.files import sha256_of
from flashvlm_export.manifest import SCHEMA_VERSION, GraphEntry, Manifest, PromptSettings, Selection, Source
from flashvlm_export.profiles import resolve_profiles
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


def add_engine(bundle: Bundle, target: str, profiles: Sequence[str] = ()) -> None:
    """Put a file in the place of an fp16 engine of TensorRT 10.3 for compute capability 8.9, and its sidecar."""
    file = engine_file(bundle, target, Precision.FP16)
    file.parent.mkdir()
    file.write_bytes(b"an engine")
    spec = bundle.manifest.graphs["fp16"].spec
    entry = EngineEntry(
        schema_version=ENGINE_SCHEMA_VERSION,
        target=target,
        backend="tensorrt",
        backend_version="10.3.0",
        compute_capabilities=["8.9"],
        precision="fp16",
        graph_sha256=bundle.graph_sha256(Precision.FP16),
        engine_sha256=sha256_of(file),
        size_bytes=file.stat().st_size,
        profiles=[list(profile) for profile in resolve_profiles(spec, profiles)],
        settings=BuildSettings(),
        build_s=1.0,
        peak_memory_bytes=1,
        census={},
    )
    write_entry(file, entry)
