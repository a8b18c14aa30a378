"""The builder's calls against recorded releases of TensorRT: what exists, its signatures, and the values of enums."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_tensorrt import RELEASES, surface
from helpers.recorded_tensorrt import recorded_module
from helpers.tensorrt_surface import describe

from flashvlm_export import tensorrt_api
from flashvlm_export.engines import BuildSettings
from flashvlm_export.export.budget_shape import spec_with_budget_shape
from flashvlm_export.export.engine_from_onnx import BuildReport, engine_from_onnx
from flashvlm_export.profiles import resolve_profiles
from flashvlm_export.specs import GraphSpec, Precision, VisualDims, visual_graph_spec
from flashvlm_export.tensorrt_api import Backend

SPEC: GraphSpec = visual_graph_spec(VisualDims(56, 14, 16, 48, 64), Precision.FP16)
PROFILES = ["batch=1,text=1:8:16,budget=1:4:8", "batch=1:2:3"]
PRECISIONS = {"FP16", "INT8", "BF16", "FP8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"}


class Build:
    """One build with a recorded release, and what it was told."""

    def __init__(
        self, release: Any, backend: Backend, settings: BuildSettings, spec: GraphSpec = SPEC, **more: Any
    ) -> None:
        self.flags: list[Any] = []
        self.network_flags: list[int] = []
        self.parsed: list[Any] = []
        self.shapes: list[tuple[Any, ...]] = []
        self.pools: list[tuple[Any, ...]] = []
        self.capabilities: dict[int, Any] = {}
        self.cache: list[bytes] = []
        self.config: Any = None

        def create_network(builder: Any, flags: int = 0) -> Any:
            self.network_flags.append(flags)
            return _new(trt.INetworkDefinition)

        def create_config(builder: Any) -> Any:
            self.config = _new(trt.IBuilderConfig)
            return self.config

        def create_cache(config: Any, content: bytes) -> Any:
            self.cache.append(content)
            return _new(trt.ITimingCache)

        def stream(builder: Any, network: Any, config: Any, writer: Any) -> bool:
            monitor = config.progress_monitor
            monitor.phase_start("phase", None, 2)
            assert monitor.step_complete("phase", 0) is True
            monitor.phase_finish("phase")
            return bool(writer.write(b"en") == 2 and writer.write(b"gine") == 4)

        behaviour: dict[str, Any] = {
            "Builder.create_network": create_network,
            "Builder.create_builder_config": create_config,
            "Builder.build_serialized_network": lambda *args: b"engine",
            "IBuilderConfig.set_flag": lambda config, flag: self.flags.append(flag),
            "IBuilderConfig.create_timing_cache": create_cache,
            "IBuilderConfig.set_memory_pool_limit": lambda config, *pool: self.pools.append(pool),
            "ITimingCache.serialize": lambda cache: b"timings",
            "IOptimizationProfile.set_shape": lambda profile, *given: self.shapes.append(given),
            "IOptimizationProfile.set_shape_input": lambda profile, *given: self.shapes.append(given),
            "OnnxParser.parse": lambda parser, content, file: self.parsed.append((content, file)) or True,
            "OnnxParser.parse_from_file": lambda parser, file: self.parsed.append(file) or True,
            "INetworkDefinition.num_layers": 1,
            "INetworkDefinition.get_layer": lambda network, index: _new(trt.ILayer),
            "ILayer.num_outputs": 1,
            "ILayer.get_output": lambda layer, index: _new(trt.ITensor),
        }
        members = release["classes"]
        if "build_serialized_network_to_stream" in members["Builder"]:
            behaviour["Builder.build_serialized_network_to_stream"] = stream
        if "set_compute_capability" in members["IBuilderConfig"]:
            behaviour["IBuilderConfig.set_compute_capability"] = lambda config, capability, index: (
                self.capabilities.update({index: capability})
            )
        trt = self.trt = recorded_module(release, behaviour)
        # Only now are there enumerations to take these from.
        trt.ILayer.type = property(lambda layer: trt.LayerType.TOPK)
        trt.ITensor.dtype = property(lambda tensor: trt.DataType.FLOAT)
        output = io.BytesIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt_api, "load", lambda name: trt)
            self.report: BuildReport = engine_from_onnx(
                Path("visual.onnx"),
                spec,
                backend,
                output,
                profiles=resolve_profiles(spec, PROFILES),
                settings=settings,
                **more,
            )
        self.engine = output.getvalue()


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


EVERYTHING = BuildSettings(
    workspace_bytes=1 << 30,
    optimization_level=5,
    version_compatible=True,
    hardware_compatible=True,
    strip_weights=True,
)


@pytest.fixture(autouse=True)
def _on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.parametrize("release", RELEASES)
class TestTensorRT:
    def test_a_plain_build_is_strongly_typed_and_nothing_more(self, release: str) -> None:
        build = Build(surface(release), "tensorrt", BuildSettings())
        bit = 0 if release.startswith("11.") else 1
        assert build.network_flags == [1 << bit]
        assert build.flags == []
        assert build.parsed == ["visual.onnx"]
        assert build.engine == b"engine"
        assert build.report.census == {"TOPK FLOAT": 1}
        assert build.config.builder_optimization_level == 3
        assert build.config.profiling_verbosity == build.trt.ProfilingVerbosity.DETAILED

    def test_profiles(self, release: str) -> None:
        build = Build(surface(release), "tensorrt", BuildSettings())
        assert build.shapes == [
            ("pixel_values", [1, 3, 56, 56], [1, 3, 56, 56], [1, 3, 56, 56]),
            ("text_embeds", [1, 1, 64], [1, 8, 64], [1, 16, 64]),
            ("text_mask", [1, 1], [1, 8], [1, 16]),
            ("budget", [1], [4], [8]),
            ("pixel_values", [1, 3, 56, 56], [2, 3, 56, 56], [3, 3, 56, 56]),
            ("text_embeds", [1, 1, 64], [2, 64, 64], [3, 512, 64]),
            ("text_mask", [1, 1], [2, 64], [3, 512]),
            ("budget", [1], [16], [16]),
        ]

    def test_a_graph_for_triton_on_the_weights_of_the_file(self, release: str) -> None:
        build = Build(surface(release), "tensorrt", BuildSettings(), spec_with_budget_shape(SPEC), instead=b"graph")
        assert build.parsed == [(b"graph", "visual.onnx")]
        assert [shape for shape in build.shapes if shape[0] in ("budget", "keep")] == [
            ("keep", [1, 1], [1, 4], [1, 8]),
            ("keep", [1, 1], [2, 16], [3, 16]),
        ]
        assert build.engine == b"engine"

    def test_every_setting(self, release: str) -> None:
        build = Build(surface(release), "tensorrt", EVERYTHING, timing_cache=b"earlier")
        flags = build.trt.BuilderFlag
        assert build.flags == [flags.VERSION_COMPATIBLE, flags.STRIP_PLAN, flags.REFIT_IDENTICAL]
        assert build.config.hardware_compatibility_level == build.trt.HardwareCompatibilityLevel.AMPERE_PLUS
        assert build.pools == [(build.trt.MemoryPoolType.WORKSPACE, 1 << 30)]
        assert build.config.builder_optimization_level == 5
        assert (build.cache, build.report.timing_cache) == ([b"earlier"], b"timings")

    def test_no_flag_of_ours_sets_a_precision(self, release: str) -> None:
        build = Build(surface(release), "tensorrt", EVERYTHING)
        assert not {flag.name for flag in build.flags} & PRECISIONS


def test_tensorrt_rtx_as_installed() -> None:
    """Its surface is described by the same code that recorded the others."""
    trt = pytest.importorskip("tensorrt_rtx", reason="describes the installed TensorRT-RTX")
    settings = BuildSettings(workspace_bytes=1 << 30)
    build = Build(describe(trt), "tensorrt-rtx", settings, capabilities=[(8, 6), (12, 0)])
    assert build.network_flags == [1]
    assert build.flags == []
    assert {index: value.name for index, value in build.capabilities.items()} == {0: "SM86", 1: "SM120"}
    assert build.engine == b"engine"
    assert build.report.timing_cache is None


class TestRecordedModule:
    """The oracle itself: it has to refuse what a release has not."""

    @pytest.fixture
    def trt(self) -> Any:
        return recorded_module(surface("10.3.0"), {})

    def test_what_a_release_has_not(self, trt: Any) -> None:
        assert not hasattr(trt, "IStreamWriter")
        assert not hasattr(trt.Builder, "build_serialized_network_to_stream")
        with pytest.raises(AttributeError, match=r"has no Builder\.dream"):
            recorded_module(surface("10.3.0"), {"Builder.dream": None})
        with pytest.raises(AttributeError):
            _new(trt.IBuilderConfig).no_such_setting = 1

    def test_a_call_that_fits_no_signature(self, trt: Any) -> None:
        config = _new(trt.IBuilderConfig)
        config.set_flag(trt.BuilderFlag.REFIT)
        for wrong in (4, "REFIT", trt.MemoryPoolType.WORKSPACE):
            with pytest.raises(TypeError, match=re.escape("IBuilderConfig.set_flag takes (self")):
                config.set_flag(wrong)
        with pytest.raises(TypeError):
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        with pytest.raises(TypeError):
            trt.Builder("logger")

    def test_the_values_that_moved(self) -> None:
        flags = {release: surface(release)["enums"] for release in RELEASES}
        typed = {name: enums["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"] for name, enums in flags.items()}
        assert {name: value for name, value in typed.items() if not name.startswith("11.")}.keys() == {
            name for name, value in typed.items() if value == 1
        }
        assert "INT8" not in json.dumps(flags["11.4.0.106"]["BuilderFlag"])
