"""Engines: built into a bundle, tied to its graph, refused where they do not belong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.engines import BuildSettings, check_engine, find_engine, list_engines, sidecar_of
from flashvlm_export.errors import BundleError, ConfigError, DependencyError, ExportError, StorageError, TargetError
from flashvlm_export.export import engine_from_bundle as module_under_test
from flashvlm_export.export.engine_from_bundle import (
    EngineSettings,
    engine_from_bundle,
    resolve_backend,
    resolve_target,
)
from flashvlm_export.files import bundle_lock
from flashvlm_export.gpu import Gpu, gpu_at_hand
from flashvlm_export.profiles import format_profile, resolve_profiles
from flashvlm_export.specs import Precision
from flashvlm_export.targets import RTX_CAPABILITIES, TARGETS

ROOT = Path(__file__).parents[2]
ORIN = Gpu("Orin", (8, 7), 64 << 30)
A100 = Gpu("NVIDIA A100", (8, 0), 80 << 30)


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an fp16 engine for one architecture. Do not change it: copy it."""
    pytest.importorskip("tensorrt_rtx", reason="engines are compiled with TensorRT-RTX")
    path = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(tiny_bundle, path)
    engine_from_bundle(EngineSettings(path, target="rtx-40"))
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


class TestBuild:
    def test_the_sidecar_describes_the_engine(self, built: Path) -> None:
        (engine,) = list_engines(Bundle.open(built))
        entry = engine.entry
        assert engine.file == built / "engines" / "rtx-40.fp16.engine"
        assert (entry.backend, entry.compute_capabilities, entry.precision) == ("tensorrt-rtx", ["8.9"], "fp16")
        assert entry.size_bytes == engine.file.stat().st_size > 100_000
        assert [format_profile(tuple(profile)) for profile in entry.profiles] == [
            "batch=1:1:8,text=1:64:512,budget=1:16:16"
        ]

    def test_the_encoder_is_half_precision_and_the_selection_is_not(self, built: Path) -> None:
        census = list_engines(Bundle.open(built))[0].entry.census
        # Two encoder layers and the projector; cosines with the text and likeness between patches.
        assert census["MATRIX_MULTIPLY HALF"] > 4 * census["MATRIX_MULTIPLY FLOAT"] > 0
        assert census["TOPK FLOAT"] > 0
        assert "TOPK HALF" not in census

    def test_the_fp32_graph_gives_an_engine_without_half_precision(self, copy: Bundle) -> None:
        engine = engine_from_bundle(EngineSettings(copy.path, Precision.FP32, target="rtx-30"))
        assert not [name for name in engine.entry.census if name.endswith(" HALF")]
        assert len(list_engines(copy)) == 2

    def test_several_profiles_and_architectures(self, copy: Bundle) -> None:
        profiles = ["batch=1,text=1:8:16,budget=1:4:8", "batch=2:4:8"]
        engine = engine_from_bundle(EngineSettings(copy.path, target="rtx", profiles=profiles))
        assert [format_profile(tuple(profile)) for profile in engine.entry.profiles] == [
            "batch=1:1:1,text=1:8:16,budget=1:4:8",
            "batch=2:4:8,text=1:64:512,budget=1:16:16",
        ]
        assert engine.entry.compute_capabilities == ["8.6", "8.9", "12.0"]

    @pytest.mark.skipif(gpu_at_hand() is not None, reason="with a GPU the weights can be left out")
    def test_without_a_gpu_the_weights_cannot_be_left_out(self, copy: Bundle) -> None:
        settings = EngineSettings(copy.path, target="rtx-40", build=BuildSettings(strip_weights=True), overwrite=True)
        with pytest.raises(ExportError, match="cannot compile") as caught:
            engine_from_bundle(settings)
        assert "with the weights inside" in str(caught.value.hint)
        check_engine(copy, find_engine(copy, Precision.FP16))

    def test_the_command_builds_and_inspect_shows_it(self, copy: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["build", str(copy.path), "--target", "rtx-50", "--profile", "batch=1", "--json"]
        assert main(arguments) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["sidecar"]["compute_capabilities"] == ["12.0"]
        assert main(["inspect", str(copy.path)]) == 0
        shown = capsys.readouterr().out
        assert "engine rtx-50 fp16: engines/rtx-50.fp16.engine" in shown
        assert "profile batch=1:1:1,text=1:64:512" in shown
        assert main(["inspect", str(copy.path), "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["engines"]) == 2


class TestRefused:
    def test_an_engine_that_is_there(self, copy: Bundle) -> None:
        with pytest.raises(StorageError, match="has an engine for this target") as caught:
            engine_from_bundle(EngineSettings(copy.path, target="rtx-40"))
        assert "--overwrite" in str(caught.value.hint)

    def test_a_second_writer(self, copy: Bundle) -> None:
        with bundle_lock(copy.path), pytest.raises(BundleError, match="another process"):
            engine_from_bundle(EngineSettings(copy.path, target="rtx-30"))

    def test_a_damaged_graph(self, copy: Bundle) -> None:
        file = copy.path / "visual.fp16.onnx.data"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        with pytest.raises(BundleError, match="damaged"):
            engine_from_bundle(EngineSettings(copy.path, target="rtx-30"))

    def test_too_little_memory_is_said_before_the_build(self, copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module_under_test, "_MEMORY_PER_WEIGHT_BYTE", 1e9)
        with pytest.raises(TargetError, match="not enough memory") as caught:
            engine_from_bundle(EngineSettings(copy.path, target="rtx-30"))
        assert "GB available" in str(caught.value.received)

    @pytest.mark.parametrize("build", [BuildSettings(version_compatible=True), BuildSettings(hardware_compatible=True)])
    def test_compatibility_modes_that_the_backend_has_not(self, copy: Bundle, build: BuildSettings) -> None:
        with pytest.raises(ConfigError, match="no compatibility modes"):
            engine_from_bundle(EngineSettings(copy.path, target="rtx-30", build=build))

    @pytest.mark.parametrize("workspace", [-1, 0, 10**20])
    def test_a_workspace_out_of_range(self, bundle: Bundle, workspace: int) -> None:
        with pytest.raises(ConfigError, match="workspace is out of range"):
            engine_from_bundle(EngineSettings(bundle.path, build=BuildSettings(workspace_bytes=workspace)))

    def test_a_timing_cache_that_the_backend_has_not(self, copy: Bundle, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no timing cache"):
            engine_from_bundle(EngineSettings(copy.path, target="rtx-30", timing_cache=tmp_path / "cache"))
        assert len(list_engines(copy)) == 1

    def test_a_precision_that_the_bundle_has_not(self, copy: Bundle) -> None:
        with pytest.raises(ConfigError) as caught:
            engine_from_bundle(EngineSettings(copy.path, Precision.INT8, target="rtx-30"))
        assert "flashvlm calibrate" in str(caught.value.hint)


def test_a_device_builds_without_what_exports(tiny_bundle: Path) -> None:
    """It has neither torch nor onnx."""
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx']))\n"
        "from flashvlm_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "build", str(tiny_bundle), "--precision", "fp32", "--target", "orin-agx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has to be built on that device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_engine_that_was_there(tiny_bundle: Path, small_disk: Path) -> None:
    """Only the engines are on the small disk."""
    pytest.importorskip("tensorrt_rtx", reason="engines are compiled with TensorRT-RTX")
    path = shutil.copytree(tiny_bundle, small_disk.parent / "bundle")
    (path / "engines").symlink_to(small_disk)
    with pytest.raises(StorageError, match="the disk is full"):
        engine_from_bundle(EngineSettings(path, target="rtx-30"))
    assert list(small_disk.iterdir()) == []


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_build_that_is_stopped_leaves_the_bundle_as_it_was(self, copy: Bundle, number: signal.Signals) -> None:
        before = _times(copy)
        command = [
            sys.executable,
            "-m",
            "flashvlm_export",
            "build",
            str(copy.path),
            "--target",
            "rtx-40",
            "--overwrite",
        ]
        with subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "error"}
        ) as build:
            assert build.stderr is not None
            assert any("building with" in line for line in build.stderr)
            time.sleep(0.5)
            build.send_signal(number)
            message = build.communicate(timeout=300)[1]
        assert build.returncode == (130 if number == signal.SIGTERM else -number)
        assert "Traceback" not in message
        assert _times(copy) == before
        check_engine(copy, find_engine(copy, Precision.FP16))
        leftovers = list((copy.path / "engines").glob(".*.partial"))
        assert len(leftovers) == (1 if number == signal.SIGKILL else 0)
        if leftovers:
            engine_from_bundle(EngineSettings(copy.path, target="rtx-30"))
            assert not leftovers[0].exists()


def _times(bundle: Bundle) -> dict[Path, int]:
    """When each file was written, without those that are not in place yet."""
    files = [file for file in bundle.path.rglob("*") if file.is_file() and file.suffix != ".partial"]
    return {file: file.stat().st_mtime_ns for file in files}


class TestCheckEngine:
    def test_one_that_was_cut_short(self, copy: Bundle) -> None:
        engine = find_engine(copy, Precision.FP16)
        engine.file.write_bytes(engine.file.read_bytes()[:-1])
        with pytest.raises(BundleError, match="damaged") as caught:
            check_engine(copy, engine)
        assert f"flashvlm build {copy.path} --precision fp16 --target rtx-40 --overwrite" in str(caught.value.hint)

    def test_one_that_was_edited(self, copy: Bundle) -> None:
        engine = find_engine(copy, Precision.FP16)
        content = bytearray(engine.file.read_bytes())
        content[len(content) // 2] ^= 1
        engine.file.write_bytes(content)
        with pytest.raises(BundleError, match="damaged"):
            check_engine(copy, engine)

    def test_one_that_is_gone(self, copy: Bundle) -> None:
        engine = find_engine(copy, Precision.FP16)
        engine.file.unlink()
        with pytest.raises(BundleError, match="missing"):
            check_engine(copy, engine)

    def test_one_of_another_graph(self, copy: Bundle) -> None:
        sidecar = sidecar_of(find_engine(copy, Precision.FP16).file)
        content = json.loads(sidecar.read_text())
        sidecar.write_text(json.dumps({**content, "graph_sha256": "0" * 64}))
        with pytest.raises(BundleError, match="another graph"):
            check_engine(copy, find_engine(copy, Precision.FP16))

    @pytest.mark.parametrize(
        ("change", "problem"),
        [({"schema_version": 2}, "newer"), ({"census": 3}, "damaged"), ({"backend": None}, "damaged")],
    )
    def test_a_sidecar_that_cannot_be_read(self, copy: Bundle, change: dict[str, object], problem: str) -> None:
        sidecar = sidecar_of(find_engine(copy, Precision.FP16).file)
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **change}))
        with pytest.raises(BundleError, match=problem):
            list_engines(copy)

    def test_none_and_several(self, copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(BundleError, match="no such engine") as caught:
            find_engine(copy, Precision.FP32)
        assert "flashvlm build" in str(caught.value.hint)
        first = find_engine(copy, Precision.FP16).file
        second = first.with_name("a100.fp16.engine")
        shutil.copy(first, second)
        sidecar_of(second).write_text(sidecar_of(first).read_text().replace("rtx-40", "a100").replace("8.9", "8.0"))
        monkeypatch.setattr("flashvlm_export.engines.gpu_at_hand", lambda: None)
        with pytest.raises(BundleError, match="several engines fit") as caught:
            find_engine(copy, Precision.FP16)
        assert "--engine a100 --precision fp16" in str(caught.value.hint)
        assert find_engine(copy, Precision.FP16, "a100").file == second

        capability = (8, 0)
        monkeypatch.setattr("flashvlm_export.engines.gpu_at_hand", lambda: Gpu("a GPU", capability, 1 << 34))
        assert find_engine(copy, Precision.FP16).file == second
        capability = (8, 9)
        assert find_engine(copy, Precision.FP16).file == first
        assert find_engine(copy, Precision.FP16, "a100").file == second
        capability = (9, 0)
        with pytest.raises(BundleError, match="several engines fit"):
            find_engine(copy, Precision.FP16)


class TestDestination:
    @pytest.fixture(autouse=True)
    def _on_x86_with_both_libraries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr(tensorrt_api, "is_installed", lambda backend: True)

    @pytest.mark.parametrize(
        ("target", "gpu", "expected"),
        [
            (None, None, ("rtx", "tensorrt-rtx")),
            (None, A100, ("sm80", "tensorrt")),
            ("a100", A100, ("a100", "tensorrt")),
            ("a100", None, ("a100", "tensorrt-rtx")),
            ("rtx-50", A100, ("rtx-50", "tensorrt-rtx")),
        ],
    )
    def test_who_builds(self, bundle: Bundle, target: str | None, gpu: Gpu | None, expected: tuple[str, str]) -> None:
        found = resolve_target(target, gpu)
        assert (found.name, resolve_backend(EngineSettings(bundle.path), found, gpu)) == expected

    @pytest.mark.parametrize("target", ["orin-agx", "orin-nano", "thor", "h100", "dgx-spark"])
    def test_what_cannot_be_built_here_names_the_command_for_there(self, bundle: Bundle, target: str) -> None:
        with pytest.raises(TargetError, match=f"an engine for {target} has to be built on that device") as caught:
            resolve_backend(EngineSettings(bundle.path), TARGETS[target], A100)
        assert f"flashvlm pack {bundle.path} --target {target} --precision fp16" in str(caught.value.hint)

    def test_on_the_device_itself_it_is_built(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        for target in (None, "orin-agx"):
            found = resolve_target(target, ORIN)
            assert found.compute_capabilities == ((8, 7),)
            assert resolve_backend(EngineSettings(bundle.path), found, ORIN) == "tensorrt"

    def test_the_backend_asked_for_is_never_exchanged(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(TargetError, match="tensorrt cannot build for a100 on this machine"):
            resolve_backend(EngineSettings(bundle.path, backend="tensorrt"), TARGETS["a100"], None)
        monkeypatch.setattr(tensorrt_api, "is_installed", lambda backend: False)
        with pytest.raises(DependencyError, match="no library"):
            resolve_backend(EngineSettings(bundle.path), TARGETS["a100"], A100)

    def test_an_unknown_target(self) -> None:
        with pytest.raises(ConfigError, match="unknown target"):
            resolve_target("abacus", None)

    def test_the_table_agrees_with_the_library(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx", reason="compares with TensorRT-RTX's own list")
        names = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
        assert {"SM{}{}".format(*capability) for capability in RTX_CAPABILITIES} == names
        assert all(name == target.name for name, target in TARGETS.items())


class TestProfiles:
    def test_none_given_is_the_graphs_own(self, bundle: Bundle) -> None:
        spec = bundle.manifest.graphs["fp16"].spec
        assert resolve_profiles(spec, []) == [spec.dims]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("batch=4:2:8", "not a range"),
            ("batch=1:9:8", "not a range"),
            ("batch=0", "not a range"),
            ("batch=1:2", "not a range"),
            ("batch=one", "not a range"),
            ("batch", "not a profile"),
            ("width=3", "not a profile"),
            ("batch=1,batch=2", "not a profile"),
            ("budget=1:8:17", "more visual tokens than there are"),
        ],
    )
    def test_what_is_no_profile(self, bundle: Bundle, text: str, problem: str) -> None:
        with pytest.raises(ConfigError, match=problem):
            resolve_profiles(bundle.manifest.graphs["fp16"].spec, [text])
