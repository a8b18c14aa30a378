"""The TensorRT session: its data flow against a fake GPU, and what it refuses. Real engines run under tests/gpu."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.fake_bundle import add_engine
from helpers.fake_tensorrt import RELEASES, FakeCuda, fake_tensorrt

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.engines import (
    BuildSettings,
    EngineEntry,
    find_engine,
)
from flashvlm_export.errors import BundleError, SessionError, UsageError
from flashvlm_export.gpu import Gpu, gpu_at_hand
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.sessions import tensorrt, tensorrt_worker
from flashvlm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm_export.runtime.sessions.tensorrt import TensorRTSession, require_fit
from flashvlm_export.specs import VISUAL_OUTPUTS, Feeds, Precision

ADA = Gpu("NVIDIA L4", (8, 9), 24 << 30)
PROFILES = ["batch=1,text=1:8:16,budget=1:4:8", "batch=1:2:3,text=1:8:40"]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle with a file in the place of an engine, and its sidecar."""
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    add_engine(bundle, "l4", PROFILES)
    return bundle


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    bindings = type(sys)("cuda.bindings")
    bindings.runtime = fake
    monkeypatch.setitem(sys.modules, "cuda", type(sys)("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setattr(tensorrt, "gpu_at_hand", lambda: ADA)
    return fake


Install = Callable[..., Any]


@pytest.fixture
def install(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a fake TensorRT in place, whose engine is the bundle's graph in ONNX Runtime."""
    pytest.importorskip("onnxruntime", reason="the fake engine computes with ONNX Runtime")
    spec = bundle.manifest.graphs["fp16"].spec
    session = OnnxRuntimeSession(bundle.graph_file(Precision.FP16), spec)
    session.open()

    def run(feeds: Feeds) -> dict[str, np.ndarray]:
        outputs = session.run(feeds)
        return dict(zip(VISUAL_OUTPUTS, (outputs.tokens, outputs.indices, outputs.scores), strict=True))

    def put(version: str = "10.3.0", *, loads: bool = True) -> Any:
        module = fake_tensorrt(spec, run, version, cuda, loads=loads)
        monkeypatch.setattr(tensorrt_api, "load", lambda backend: module)
        return module

    return put


def feeds(bundle: Bundle, batch: int, text: int, budget: int) -> Feeds:
    dims, rng = bundle.manifest.dims, np.random.default_rng(batch)
    return {
        "pixel_values": rng.standard_normal((batch, 3, dims.image_size, dims.image_size), np.float32),
        # Every other row of a larger array: what is copied to a device has to be contiguous first.
        "text_embeds": rng.standard_normal((batch, 2 * text, dims.llm_width)).astype(np.float16)[:, ::2],
        "text_mask": np.ones((batch, text), bool),
        "budget": np.array(budget),
    }


def agrees(session: TensorRTSession, graph: OnnxRuntimeSession, given: Feeds) -> None:
    have, want = session.run(given), graph.run(given)
    np.testing.assert_array_equal(have.tokens, want.tokens)
    np.testing.assert_array_equal(have.indices, want.indices)
    np.testing.assert_array_equal(have.scores, want.scores)


@pytest.fixture
def graph(bundle: Bundle) -> Iterator[OnnxRuntimeSession]:
    pytest.importorskip("onnxruntime", reason="what the fake engine computes with")
    spec = bundle.manifest.graphs["fp16"].spec
    with OnnxRuntimeSession(bundle.graph_file(Precision.FP16), spec) as session:
        yield session


@pytest.mark.parametrize("release", RELEASES)
def test_what_comes_back_is_what_the_engine_computed(
    bundle: Bundle, install: Install, cuda: FakeCuda, graph: OnnxRuntimeSession, release: str
) -> None:
    """With the calls of each recorded release; whatever it lacks would raise."""
    engine = find_engine(bundle)
    engine = replace(engine, entry=replace(engine.entry, backend_version=release))
    module = install(release)
    with TensorRTSession(bundle, engine) as session:
        held = len(cuda.allocated)
        for sizes in ((3, 40, 16), (1, 16, 8), (1, 1, 1), (2, 7, 5)):
            agrees(session, graph, feeds(bundle, *sizes))
        assert len(cuda.allocated) == held == 6  # allocated once: three inputs, three outputs
    assert module.contexts_used == [1, 0, 0, 1]
    assert (cuda.allocated, cuda.streams) == ({}, {})


def test_threads_share_the_engine_and_nothing_else(
    bundle: Bundle, install: Install, cuda: FakeCuda, graph: OnnxRuntimeSession
) -> None:
    """Two calls at once, each with everything on its stream before either computes: each has to find its own."""
    install()
    both = threading.Barrier(2, timeout=60)
    with TensorRTSession(bundle, find_engine(bundle)) as session, ThreadPoolExecutor(2) as pool:
        cuda.before_kernels = both.wait
        runs = [pool.submit(session.run, feeds(bundle, batch, 7, 5)) for batch in (1, 2)]
        outputs = [run.result() for run in runs]
        cuda.before_kernels = lambda: None
        for batch, have in zip((1, 2), outputs, strict=True):
            np.testing.assert_array_equal(have.tokens, graph.run(feeds(bundle, batch, 7, 5)).tokens)
        for _ in range(5):  # threads that come and go take what is there
            threading.Thread(target=session.run, args=(feeds(bundle, 1, 7, 5),)).run()
        assert (len(cuda.allocated), len(cuda.streams)) == (12, 2)  # as many as there were calls at once
    assert (cuda.allocated, cuda.streams) == ({}, {})


@pytest.mark.parametrize("refused", ["set_input_shape", "set_tensor_address", "set_optimization_profile_async"])
def test_what_tensorrt_refuses_is_no_result(
    bundle: Bundle, install: Install, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    module = install()
    monkeypatch.setattr(module.IExecutionContext, refused, lambda *args: False)
    session = TensorRTSession(bundle, find_engine(bundle))
    with pytest.raises(SessionError):  # noqa: PT012  # opening asks for the profile, running for the rest
        session.open()
        session.run(feeds(bundle, 1, 7, 5))
    session.close()
    assert (cuda.allocated, cuda.streams) == ({}, {})


class TestCudaGraphs:
    def test_each_set_of_sizes_is_captured_once_and_replayed(
        self, bundle: Bundle, install: Install, cuda: FakeCuda, graph: OnnxRuntimeSession
    ) -> None:
        install()
        rng = np.random.default_rng(0)
        with TensorRTSession(bundle, find_engine(bundle), cuda_graphs=True) as session:
            for sizes in ((1, 7, 5), (1, 7, 5), (2, 7, 5), (1, 7, 5), (1, 7, 6), (2, 7, 5)):
                given = feeds(bundle, *sizes)
                pixels = rng.standard_normal(given["pixel_values"].shape, np.float32)
                agrees(session, graph, {**given, "pixel_values": pixels})
            assert (len(cuda.graphs), cuda.replays) == (3, 3)
            # The budget that a graph was captured with is its own, whatever becomes of the caller's array.
            given = dict(feeds(bundle, 1, 7, 4))
            for _ in range(2):
                agrees(session, graph, given)
                given["budget"][...] = 3
                given["budget"] = np.array(4)
        assert (cuda.allocated, cuda.streams, cuda.graphs) == ({}, {}, [])

    def test_the_least_recently_used_graph_makes_room(
        self, bundle: Bundle, install: Install, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install()
        monkeypatch.setattr(tensorrt_worker, "MOST_GRAPHS", 2)
        with TensorRTSession(bundle, find_engine(bundle), cuda_graphs=True) as session:
            for budget in (1, 2, 1, 3, 1, 2):
                session.run(feeds(bundle, 1, 7, budget))
            assert (len(cuda.graphs), cuda.replays) == (2, 2)  # 1 twice; 2 gave way to 3 and is captured anew

    def test_an_engine_that_cannot_be_captured_is_refused(
        self, bundle: Bundle, install: Install, cuda: FakeCuda, graph: OnnxRuntimeSession
    ) -> None:
        install()
        cuda.captures = False
        with TensorRTSession(bundle, find_engine(bundle), cuda_graphs=True) as session:
            with pytest.raises(SessionError, match="cannot be captured") as caught:
                session.run(feeds(bundle, 1, 7, 5))
            assert "--cuda-graphs" in str(caught.value.hint)
            # The stream is out of its capture, so that the session is as before.
            cuda.captures = True
            agrees(session, graph, feeds(bundle, 1, 7, 5))

    def test_tensorrt_rtx_captures_inside_of_its_contexts(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx", reason="the names are TensorRT-RTX's own")
        given: list[Any] = []
        config = SimpleNamespace(cuda_graph_strategy=None)
        engine = SimpleNamespace(
            create_runtime_config=lambda: config, create_execution_context=lambda *args: given.append(args)
        )
        for cuda_graphs in (False, True):
            tensorrt_api.create_context(trt, engine, "tensorrt-rtx", cuda_graphs=cuda_graphs)
        assert given == [(), (config,)]
        assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert isinstance(trt.ICudaEngine.create_runtime_config, Callable)
        assert isinstance(trt.IRuntimeConfig.cuda_graph_strategy, property)

    def test_without_an_engine_they_are_refused(self, bundle: Bundle) -> None:
        with pytest.raises(UsageError, match="CUDA graphs are for TensorRT engines"):
            Pipeline.open(bundle, cuda_graphs=True)


@pytest.mark.parametrize("sizes", [(4, 8, 4), (2, 41, 4), (3, 200, 16)])
def test_sizes_that_no_profile_holds(bundle: Bundle, install: Install, sizes: tuple[int, int, int]) -> None:
    install()
    with (
        TensorRTSession(bundle, find_engine(bundle)) as session,
        pytest.raises(SessionError, match="no profile") as caught,
    ):
        session.run(feeds(bundle, *sizes))
    assert "--profile batch=1:1:1,text=1:8:16,budget=1:4:8 --profile batch=1:2:3" in str(caught.value.hint)


def test_too_little_memory_on_the_gpu_frees_what_was_taken(bundle: Bundle, install: Install, cuda: FakeCuda) -> None:
    install()
    cuda.memory_bytes = 100_000
    with pytest.raises(SessionError, match="CUDA runtime reports"):
        TensorRTSession(bundle, find_engine(bundle)).open()
    assert (cuda.allocated, cuda.streams) == ({}, {})


def test_an_engine_that_the_library_cannot_load(bundle: Bundle, install: Install, cuda: FakeCuda) -> None:
    install(loads=False)
    with pytest.raises(SessionError, match="cannot load the engine") as caught:
        TensorRTSession(bundle, find_engine(bundle)).open()
    assert f"flashvlm build {bundle.path} --precision fp16 --target l4 --overwrite" in str(caught.value.hint)
    assert (cuda.allocated, cuda.streams) == ({}, {})


def test_an_edited_engine_is_not_loaded(bundle: Bundle, install: Install) -> None:
    install()
    engine = find_engine(bundle)
    engine.file.write_bytes(b"an_engine")
    with pytest.raises(BundleError, match="damaged"):
        TensorRTSession(bundle, engine).open()


class TestRequireFit:
    @pytest.fixture
    def entry(self, bundle: Bundle) -> EngineEntry:
        return find_engine(bundle).entry

    def test_the_gpu_and_version_it_was_built_for(self, entry: EngineEntry) -> None:
        require_fit(entry, "10.3.0", ADA, "rebuild")

    def test_no_gpu(self, entry: EngineEntry) -> None:
        with pytest.raises(SessionError, match="no NVIDIA GPU"):
            require_fit(entry, "10.3.0", None, "rebuild")

    def test_another_gpu(self, entry: EngineEntry) -> None:
        orin = Gpu("Orin", (8, 7), 1)
        with pytest.raises(SessionError, match="another GPU") as caught:
            require_fit(entry, "10.3.0", orin, "rebuild")
        assert "Orin, compute capability 8.7" in str(caught.value.received)
        require_fit(replace(entry, settings=BuildSettings(hardware_compatible=True)), "10.3.0", orin, "rebuild")

    @pytest.mark.parametrize(
        ("version", "plain", "compatible"),
        [("10.3.1", False, True), ("10.16.0", False, True), ("11.0.0", False, False)],
    )
    def test_another_version(self, entry: EngineEntry, version: str, plain: bool, compatible: bool) -> None:
        for settings, fits in ((BuildSettings(), plain), (BuildSettings(version_compatible=True), compatible)):
            changed = replace(entry, settings=settings)
            if fits:
                require_fit(changed, version, ADA, "rebuild")
            else:
                with pytest.raises(SessionError, match="another version") as caught:
                    require_fit(changed, version, ADA, "the command")
                assert "the command" in str(caught.value.hint)


@pytest.mark.skipif(gpu_at_hand() is not None, reason="shows what happens without a GPU")
def test_without_gpu_or_library_the_command_says_so_and_runs_nothing_else(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    arguments = ["run", str(bundle.path), "--image", str(tmp_path / "photo.png"), "--prompt", "What?", "--engine"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "tensorrt cannot be loaded" in printed.err or "no NVIDIA GPU" in printed.err
    assert main([*arguments, "orin-agx"]) == 1
    assert "the bundle has no such engine" in capsys.readouterr().err
