"""The archive for a device: what is in it, and what its scripts refuse. tests/device_lane.sh installs one for real."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.fake_bundle import make_fake_bundle

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.engines import SCHEMA_VERSION, BuildSettings, EngineEntry, engine_file, write_entry
from flashvlm_export.errors import BundleError, ConfigError, DependencyError, StorageError
from flashvlm_export.export import pack as module_under_test
from flashvlm_export.export.pack import Archive, PackSettings, pack
from flashvlm_export.files import sha256_of
from flashvlm_export.specs import Precision
from flashvlm_export.targets import TARGETS


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A file in the place of the runtime's wheel."""
    file = tmp_path / "flashvlm_export-1.0-py3-none-any.whl"
    file.write_bytes(b"a wheel")
    return file


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def unpack(archive: Archive, directory: Path) -> Path:
    with tarfile.open(archive.file) as tar:
        tar.extractall(directory, filter="data")
    (root,) = directory.iterdir()
    return root


def add_engine(bundle: Bundle, target: str) -> Path:
    """Put a file in the place of an fp16 engine for ``target``."""
    file = engine_file(bundle, target, Precision.FP16)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"an engine")
    capabilities = [TARGETS[target].capabilities]
    entry = EngineEntry(
        schema_version=SCHEMA_VERSION,
        target=target,
        backend="tensorrt-rtx",
        backend_version="1.7.1",
        compute_capabilities=capabilities,
        precision="fp16",
        graph_sha256=bundle.graph_sha256(Precision.FP16),
        engine_sha256=sha256_of(file),
        size_bytes=file.stat().st_size,
        profiles=[],
        settings=BuildSettings(),
        build_s=1.0,
        peak_memory_bytes=1,
        census={},
    )
    write_entry(file, entry)
    return file


class TestContents:
    def test_the_bundle_comes_out_whole(self, bundle: Bundle, wheel: Path, tmp_path: Path) -> None:
        (bundle.path / "notes.txt").write_text("not of the bundle")
        archive = pack(PackSettings(bundle.path, "orin-agx", wheel=wheel))
        assert archive.file == tmp_path / "bundle-orin-agx.tar"
        assert (archive.size_bytes, archive.sha256) == (archive.file.stat().st_size, sha256_of(archive.file))
        root = unpack(archive, tmp_path / "out")
        assert root.name == "bundle-orin-agx"
        assert Bundle.open(root / "bundle", verify=True).manifest == bundle.manifest
        assert not (root / "bundle" / "notes.txt").exists()
        assert (root / "wheels" / wheel.name).read_bytes() == b"a wheel"
        assert os.access(root / "install.sh", os.X_OK)
        assert archive.commands[:4] == [
            "tar -xf bundle-orin-agx.tar",
            "cd bundle-orin-agx",
            "./install.sh",
            "./build.sh",
        ]

    def test_only_the_graphs_asked_for(self, bundle: Bundle, wheel: Path, tmp_path: Path) -> None:
        root = unpack(
            pack(PackSettings(bundle.path, "thor", precisions=[Precision.FP32], wheel=wheel)), tmp_path / "out"
        )
        part = Bundle.open(root / "bundle", verify=True)
        assert list(part.manifest.graphs) == list(part.manifest.checks) == ["fp32"]
        assert not list((root / "bundle").glob("*fp16*"))
        assert "PRECISION=fp32\n" in (root / "target.env").read_text()

    def test_the_same_input_gives_the_same_bytes(self, bundle: Bundle, wheel: Path, tmp_path: Path) -> None:
        first = pack(PackSettings(bundle.path, "orin-nx", wheel=wheel, output=tmp_path / "a.tar"))
        os.utime(bundle.path / "tokenizer.json", (1, 1))
        second = pack(PackSettings(bundle.path, "orin-nx", wheel=wheel, output=tmp_path / "b.tar"))
        assert first.sha256 == second.sha256

    def test_engines_for_the_target_and_no_others(self, bundle: Bundle, wheel: Path, tmp_path: Path) -> None:
        add_engine(bundle, "l4")
        add_engine(bundle, "rtx-50")
        archive = pack(PackSettings(bundle.path, "l4", wheel=wheel))
        root = unpack(archive, tmp_path / "out")
        assert sorted(file.name for file in (root / "bundle" / "engines").iterdir()) == [
            "l4.fp16.engine",
            "l4.fp16.engine.json",
        ]
        assert "./build.sh" not in archive.commands
        assert (root / "requirements.txt").read_text() == f"./wheels/{wheel.name}[ort,rtx]\n"

    @pytest.mark.parametrize(
        ("target", "lines"),
        [
            ("orin-agx", ["[ort]", "cuda-python>=12.9,<13"]),
            ("thor", ["[ort]", "cuda-python>=13.0,<14"]),
            ("h100", ["[ort,tensorrt]"]),
        ],
    )
    def test_what_is_installed_there(
        self, bundle: Bundle, wheel: Path, tmp_path: Path, target: str, lines: list[str]
    ) -> None:
        """Bindings of JetPack's CUDA; on a Jetson no TensorRT from an index, which would shadow JetPack's."""
        root = unpack(pack(PackSettings(bundle.path, target, wheel=wheel)), tmp_path / "out")
        have = (root / "requirements.txt").read_text().splitlines()
        assert have == [f"./wheels/{wheel.name}{lines[0]}", *lines[1:]]

    def test_a_bundle_without_a_decoder_says_visual_only(self, wheel: Path, tmp_path: Path) -> None:
        make_fake_bundle(tmp_path / "fake")
        archive = pack(PackSettings(tmp_path / "fake", "orin-agx", wheel=wheel))
        assert "--visual-only" in archive.commands[-1]


class TestRefused:
    def test_a_damaged_graph(self, bundle: Bundle, wheel: Path) -> None:
        file = bundle.path / "visual.fp16.onnx.data"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        with pytest.raises(BundleError, match="damaged"):
            pack(PackSettings(bundle.path, "orin-agx", wheel=wheel))

    def test_a_damaged_engine(self, bundle: Bundle, wheel: Path) -> None:
        add_engine(bundle, "l4").write_bytes(b"no engine")
        with pytest.raises(BundleError, match="engine file is damaged"):
            pack(PackSettings(bundle.path, "l4", wheel=wheel))

    def test_an_archive_that_is_there(self, bundle: Bundle, wheel: Path, tmp_path: Path) -> None:
        output = tmp_path / "there.tar"
        output.write_bytes(b"something")
        with pytest.raises(StorageError, match="already"):
            pack(PackSettings(bundle.path, "orin-agx", output=output, wheel=wheel))
        assert output.read_bytes() == b"something"
        pack(PackSettings(bundle.path, "orin-agx", output=output, wheel=wheel, overwrite=True))
        assert tarfile.is_tarfile(output)

    def test_a_full_disk_leaves_nothing(self, bundle: Bundle, wheel: Path, small_disk: Path) -> None:
        with pytest.raises(StorageError, match="not enough disk space"):
            pack(PackSettings(bundle.path, "orin-agx", output=small_disk / "archive.tar", wheel=wheel))
        assert list(small_disk.iterdir()) == []

    def test_a_precision_that_the_bundle_has_not(self, bundle: Bundle, wheel: Path) -> None:
        with pytest.raises(ConfigError, match="no visual graph in this precision") as caught:
            pack(PackSettings(bundle.path, "orin-agx", precisions=[Precision.INT8], wheel=wheel))
        assert "flashvlm calibrate" in str(caught.value.hint)

    @pytest.mark.parametrize("name", ["other-1.0-py3-none-any.whl", "flashvlm_export-1.0.tar.gz", "missing.whl"])
    def test_a_file_that_is_no_wheel_of_ours(self, bundle: Bundle, tmp_path: Path, name: str) -> None:
        if "missing" not in name:
            (tmp_path / name).write_bytes(b"?")
        with pytest.raises(ConfigError, match="not a wheel of this package"):
            pack(PackSettings(bundle.path, "orin-agx", wheel=tmp_path / name))

    def test_offline_for_a_machine_whose_python_is_not_known(self, bundle: Bundle, wheel: Path) -> None:
        with pytest.raises(ConfigError, match="only a Jetson"):
            pack(PackSettings(bundle.path, "h100", offline=True, wheel=wheel))

    def test_wheels_that_cannot_be_had(
        self, bundle: Bundle, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The file is no wheel, so that pip ends before it asks any index."""
        with pytest.raises(DependencyError, match="cannot be downloaded"):
            pack(PackSettings(bundle.path, "orin-agx", offline=True, wheel=wheel))
        assert not list(tmp_path.glob("*.tar*"))

    def test_without_source_a_wheel_is_asked_for(
        self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        installed = tmp_path / "site-packages" / "flashvlm_export" / "__init__.py"
        monkeypatch.setattr("flashvlm_export.__file__", str(installed))
        with pytest.raises(DependencyError, match="no source tree") as caught:
            pack(PackSettings(bundle.path, "orin-agx"))
        assert "--wheel FILE" in str(caught.value.hint)


class TestCommands:
    def test_pack_prints_what_to_type_there(
        self, bundle: Bundle, wheel: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pack", str(bundle.path), "--target", "orin-agx", "--wheel", str(wheel), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["sha256"] == sha256_of(Path(printed["archive"]))
        assert printed["commands"][2:4] == ["./install.sh", "./build.sh"]

    def test_build_packs_for_a_device_that_alone_can_build(
        self, bundle: Bundle, wheel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module_under_test, "wheel_from_source", lambda wheels: Path(shutil.copy(wheel, wheels)))
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        assert main(["build", str(bundle.path), "--target", "orin-nano", "--pack"]) == 0
        shown = capsys.readouterr()
        assert "an engine for orin-nano has to be built on that device" in shown.err
        assert "./build.sh" in shown.out
        with tarfile.open(bundle.path.with_name("bundle-orin-nano.tar")) as tar:
            names = tar.getnames()
        assert "bundle-orin-nano/bundle/visual.fp16.onnx" in names
        assert "bundle-orin-nano/bundle/visual.fp32.onnx" not in names

    def test_targets_prints_the_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["targets", "thor", "l4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["thor", "l4"]
        assert "JetPack 7.1, TensorRT 10.13" in lines[1]
        assert main(["targets", "--json"]) == 0
        assert [row["name"] for row in json.loads(capsys.readouterr().out)["targets"]] == list(TARGETS)
        assert main(["targets", "abacus"]) == 2


class TestInstallScript:
    """The scripts against a stand-in device: commands of its own before those of this machine."""

    @pytest.fixture
    def root(self, wheel: Path, tmp_path: Path) -> Path:
        make_fake_bundle(tmp_path / "fake")
        return unpack(pack(PackSettings(tmp_path / "fake", "orin-agx", wheel=wheel)), tmp_path / "out")

    def run(self, root: Path, script: str, **commands: str) -> subprocess.CompletedProcess[str]:
        tools = root / "tools"
        tools.mkdir()
        for name, body in commands.items():
            (tools / name).write_text(f"#!/bin/sh\n{body}\n")
            (tools / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.run([root / script], env=environment, capture_output=True, text=True, check=False)

    def test_another_machine(self, root: Path) -> None:
        done = self.run(root, "install.sh", uname="echo riscv64")
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            "install.sh: this archive is for another machine",
            "  received: riscv64",
            "  expected: aarch64 (Jetson AGX Orin)",
        ]

    @pytest.mark.parametrize("version", ["3.8", "3.13"])
    def test_another_python(self, root: Path, version: str) -> None:
        done = self.run(root, "install.sh", uname="echo aarch64", python3=f"echo {version}")
        assert done.returncode == 1
        assert f"received: {version}" in done.stderr

    def test_no_tensorrt(self, root: Path) -> None:
        done = self.run(root, "install.sh", uname="echo aarch64", python3=f'exec {shlex.quote(sys.executable)} -S "$@"')
        assert done.returncode == 1
        assert "sudo apt install nvidia-jetpack" in done.stderr
        assert not (root / ".venv").exists()

    def test_wheels_of_another_python(self, root: Path) -> None:
        with (root / "target.env").open("a") as file:
            file.write("OFFLINE=yes\n")
        done = self.run(root, "install.sh", uname="echo aarch64", python3="echo 3.12")
        assert done.returncode == 1
        assert "expected: 3.10" in done.stderr

    def test_build_before_install(self, root: Path) -> None:
        done = self.run(root, "build.sh")
        assert done.returncode == 1
        assert "run ./install.sh" in done.stderr
