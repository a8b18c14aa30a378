"""Opening a bundle: what is missing, damaged or too new is named, with the command that mends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_bundle import FILES, make_fake_bundle

from flashvlm_export import bundle as bundle_module
from flashvlm_export.bundle import MANIFEST, Bundle
from flashvlm_export.errors import BundleError, ConfigError
from flashvlm_export.files import sha256_of
from flashvlm_export.manifest import SCHEMA_VERSION, decode_manifest
from flashvlm_export.records import encode_record
from flashvlm_export.specs import Precision


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle").path


def refusal(path: Path, *, verify: bool = False) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify=verify)
    assert caught.value.exit_code == 1
    assert caught.value.hint
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((path / MANIFEST).read_bytes())
    change(content)
    (path / MANIFEST).write_text(json.dumps(content))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_whole_bundle_opens_and_hands_out_its_files(path: Path) -> None:
    for verify in (False, True):
        bundle = Bundle.open(str(path), verify=verify)
        assert set(bundle.manifest.files) == set(FILES)
        assert bundle.file("llm/model.onnx") == path / "llm" / "model.onnx"
        assert bundle.graph_file(Precision.FP32) == path / "visual.fp32.onnx"


def test_a_manifest_survives_being_written_and_read(path: Path) -> None:
    manifest = Bundle.open(path).manifest
    assert decode_manifest(encode_record(manifest)) == manifest
    assert isinstance(manifest.graphs["fp32"].spec.inputs[0].shape, tuple)


def test_what_the_bundle_lacks_is_named_with_what_it_has(path: Path) -> None:
    bundle = Bundle.open(path)
    with pytest.raises(BundleError) as no_file:
        bundle.file("preprocessor.json")
    assert "no preprocessor.json" in str(no_file.value)
    assert "tokenizer.json" in str(no_file.value.received)
    with pytest.raises(ConfigError) as no_graph:
        bundle.graph_file(Precision.INT8)
    assert (no_graph.value.received, no_graph.value.expected) == ("int8", "one of fp32")


@pytest.mark.parametrize("what", ["nothing", "a file", "a directory", "a manifest that is a directory", "a checkpoint"])
def test_where_there_is_no_bundle(tmp_path: Path, what: str) -> None:
    path = tmp_path / "bundle"
    if what == "a file":
        path.write_text("not a directory")
    elif what != "nothing":
        path.mkdir()
        (path / "model.onnx").touch()
    if what == "a manifest that is a directory":
        (path / MANIFEST).mkdir()
    if what == "a checkpoint":
        (path / "config.json").write_text("{}")
    message = refusal(path)
    assert "there is no bundle at this path" in message
    source = str(path) if what == "a checkpoint" else "MODEL"
    assert f"flashvlm export {source} --output BUNDLE" in message
    reason = {"nothing": "no such directory", "a file": "not a directory"}.get(what, "no manifest.json")
    assert f"{path} ({reason})" in message


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_manifest(path: Path, share: float) -> None:
    content = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(content[: int(share * len(content))])
    message = refusal(path)
    assert "manifest.json is damaged" in message
    assert "flashvlm export" in message


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b"7", b'"bundle"', b"\0" * 4096, b"\xff\xfe\xfd", b'{"schema_version": "\xff"}', b"[" * 100_000],
    ids=["list", "null", "number", "text", "zeros", "no utf-8", "no utf-8 inside", "deep"],
)
def test_a_manifest_that_is_something_else(path: Path, content: bytes) -> None:
    (path / MANIFEST).write_bytes(content)
    assert "manifest.json is damaged" in refusal(path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.pop("dims"), "dims"),
        (lambda m: m.pop("schema_version"), "schema_version"),
        (lambda m: m.update(schema_version="one"), "$.schema_version"),
        (lambda m: m["dims"].update(image_size="336 px"), "$.dims.image_size"),
        (lambda m: m["dims"].update(num_patches=None), "$.dims.num_patches"),
        (lambda m: m["source"].pop("family"), "$.source"),
        (lambda m: m.update(files=["visual.fp32.onnx"]), "$.files"),
        (lambda m: m["files"]["tokenizer.json"].update(sha256=5), "$.files[...].sha256"),
        (lambda m: m["graphs"]["fp32"]["spec"]["inputs"][0].update(dtype="float8"), "spec.inputs[0].dtype"),
        (lambda m: m["graphs"]["fp32"]["spec"]["dims"][0].update(min=9, max=1), "spec.dims[0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_manifest_names_the_place(path: Path, change: Callable[[dict[str, Any]], object], place: str) -> None:
    edit(path, change)
    message = refusal(path)
    assert "manifest.json is damaged" in message
    assert place in message


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 999])
@pytest.mark.parametrize("layout", ["same", "other"])
def test_a_newer_bundle_asks_for_a_newer_reader(path: Path, version: int, layout: str) -> None:
    if layout == "same":
        edit(path, lambda m: m.update(schema_version=version))
    else:
        (path / MANIFEST).write_text(json.dumps({"schema_version": version, "parts": []}))
    message = refusal(path)
    assert "written by a newer flashvlm-export" in message
    assert f"schema version {version}" in message
    assert f"at most {SCHEMA_VERSION}" in message
    assert "pip install --upgrade" in message


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (Path.unlink, "{name}: missing"),
        (replace_by_directory, "{name}: missing"),
        (cut, "{name}: {less} bytes instead of {size}"),
        (grow, "{name}: {more} bytes instead of {size}"),
        (flip, "{name}: content differs"),
    ],
    ids=["unlink", "directory", "cut", "grow", "flip"],
)
def test_a_damaged_file_is_named(path: Path, name: str, damage: Callable[[Path], None], problem: str) -> None:
    damage(path / name)
    message = refusal(path)
    size = FILES[name]
    assert problem.format(name=name, size=size, less=size - 1, more=size + 1) in message
    assert "flashvlm export some/model " in message
    assert f"--output {path}" in message


def test_all_damage_is_told_at_once(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    cut(path / "visual.fp32.onnx")
    flip(path / "llm/model.onnx")
    message = refusal(path)
    assert "tokenizer.json: missing" in message
    assert "visual.fp32.onnx: 699 bytes" in message
    assert "llm/model.onnx: content differs" in message
    assert "text_embeddings.npy" not in message


def test_large_files_are_hashed_only_on_demand(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_HASHED_ON_OPEN_BYTES", 1000)
    flip(path / "visual.fp32.onnx.data")  # 5000 bytes
    Bundle.open(path)
    assert "visual.fp32.onnx.data: content differs" in refusal(path, verify=True)
    flip(path / "visual.fp32.onnx.data")
    Bundle.open(path, verify=True)
    cut(path / "visual.fp32.onnx.data")
    assert "4999 bytes instead of 5000" in refusal(path)


@pytest.mark.parametrize("place", ["../secret", "llm/../../secret", "{absolute}"])
def test_a_manifest_cannot_point_outside_of_its_bundle(path: Path, place: str) -> None:
    secret = path.parent / "secret"
    secret.write_text("of someone else")
    name = place.format(absolute=secret)
    entry = {"size_bytes": secret.stat().st_size, "sha256": sha256_of(secret)}
    edit(path, lambda m: m["files"].update({name: entry}))
    assert f"{name}: points outside of the bundle" in refusal(path)


def test_a_graph_must_be_among_the_files(path: Path) -> None:
    secret = path.parent / "secret.onnx"
    secret.touch()
    edit(path, lambda m: m["graphs"]["fp32"].update(file="../secret.onnx"))
    with pytest.raises(BundleError, match=r"no \.\./secret\.onnx"):
        Bundle.open(path).graph_file(Precision.FP32)
