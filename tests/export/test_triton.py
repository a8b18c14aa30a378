"""The model repository for Triton: against its published schema, and served by a stand-in that batches by its rules."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("tritonclient.grpc", reason="Triton's published schema comes with tritonclient")
from helpers.asking import greedy, picture
from helpers.triton_stand_in import TritonStandIn, fits, read_config, serving
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.engines import (
    SCHEMA_VERSION,
    BuildSettings,
    EngineEntry,
    check_engine,
    engine_file,
    find_engine,
    write_entry,
)
from flashvlm_export.errors import BundleError, ConfigError, SessionError, StorageError
from flashvlm_export.export import engine_from_bundle as engine_from_bundle_module
from flashvlm_export.export import triton_repository as module_under_test
from flashvlm_export.export.budget_shape import graph_with_budget_shape, spec_with_budget_shape
from flashvlm_export.export.engine_from_bundle import EngineSettings, engine_from_bundle
from flashvlm_export.export.engine_from_onnx import BuildReport, engine_from_onnx
from flashvlm_export.export.triton_repository import TritonSettings, triton_repository
from flashvlm_export.files import sha256_of
from flashvlm_export.gpu import Gpu
from flashvlm_export.profiles import resolve_profiles
from flashvlm_export.runtime.graph_inputs import GraphInputs, visual_feeds
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Request
from flashvlm_export.specs import Array, GraphSpec, Precision

ROOT = Path(__file__).parents[2]
# As the tests themselves find the package: in the folder that they run in.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
FAMILIES = ["tiny_bundle", "next_bundle", "onevision_bundle", "qwen_bundle"]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("triton_client", ROOT / "examples" / "triton_client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(params=FAMILIES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """One bundle of each family."""
    return Bundle.open(request.getfixturevalue(request.param))


def export(bundle: Bundle, output: Path, **more: Any) -> TritonStandIn:
    return TritonStandIn(triton_repository(TritonSettings(bundle.path, output, **more)).directory)


def as_keep(feeds: dict[str, Array]) -> dict[str, Array]:
    """The request for what ``feeds`` ask of the bundle's own graph."""
    keep = np.zeros((len(feeds["text_mask"]), int(feeds["budget"])), np.bool_)
    return {name: array for name, array in feeds.items() if name != "budget"} | {"keep": keep}


def own_graph(bundle: Bundle, precision: Precision = Precision.FP32) -> Any:
    """The bundle's graph in ONNX Runtime, as a function of its inputs."""
    spec = bundle.manifest.graphs[precision.value].spec
    session = onnxruntime.InferenceSession(bundle.graph_file(precision), providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in spec.outputs]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def feeds_of(bundle: Bundle, budget: int, seeds: list[int], precision: Precision = Precision.FP32) -> dict[str, Array]:
    """Inputs of the bundle's graph: pictures of one size, and texts that differ."""
    inputs = GraphInputs(bundle)
    random = np.random.default_rng(seeds)
    images = [inputs.prepare(picture((90, 60)).rotate(90 * seed)) for seed in seeds]
    texts = [random.permutation(inputs.random_text_rows(seed, precision)) for seed in seeds]
    return visual_feeds(images, texts, budget)


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


class TestGraph:
    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_it_returns_the_bits_of_the_bundles_graph(self, bundle: Bundle, tmp_path: Path, rows: int) -> None:
        own, served = own_graph(bundle), export(bundle, tmp_path / "repository")
        least = bundle.manifest.dims.least_patches
        for budget in sorted({1, 2, max(1, least // 2), least}):
            feeds = feeds_of(bundle, budget, list(range(rows)))
            assert same(served.infer([as_keep(feeds)])[0], own(feeds))

    def test_half_precision(self, tiny_bundle: Path, tmp_path: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        served = export(bundle, tmp_path / "repository", precision=Precision.FP16)
        feeds = feeds_of(bundle, 5, [0, 1], Precision.FP16)
        (answer,) = served.infer([as_keep(feeds)])
        assert answer["visual_tokens"].dtype == np.float16
        assert same(answer, own_graph(bundle, Precision.FP16)(feeds))

    def test_only_the_input_and_two_nodes_are_new(self, bundle: Bundle, tmp_path: Path) -> None:
        model = triton_repository(TritonSettings(bundle.path, tmp_path / "repository")).directory / "1" / "model.onnx"
        onnx.checker.check_model(model)
        rewritten = onnx.load(model, load_external_data=False)
        original = onnx.load(bundle.graph_file(Precision.FP32), load_external_data=False)
        assert [node.op_type for node in rewritten.graph.node[:2]] == ["Shape", "Squeeze"]
        del rewritten.graph.node[:2]
        for graph in (rewritten.graph, original.graph):
            (place,) = [place for place, value in enumerate(graph.input) if value.name in ("keep", "budget")]
            del graph.input[place]
        assert rewritten == original

    def test_weights_are_copied_and_not_read(self, copy: Bundle, tmp_path: Path) -> None:
        before = sha256_of(copy.path / "visual.fp32.onnx.data")
        model = triton_repository(TritonSettings(copy.path, tmp_path / "repository"))
        assert sha256_of(model.directory / "1" / "visual.fp32.onnx.data") == before
        (copy.path / "visual.fp32.onnx.data").unlink()
        graph = graph_with_budget_shape(copy.path / "visual.fp32.onnx")
        assert [value.name for value in graph.graph.input][-1] == "keep"

    def test_a_width_beyond_what_there_is_keeps_all(self, tiny_bundle: Path, tmp_path: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        served = export(bundle, tmp_path / "repository")
        request = as_keep(feeds_of(bundle, 16, [0]))
        (all_of_them,) = served.infer([request])
        (answer,) = served.infer([request | {"keep": np.zeros((1, 999), np.bool_)}])
        assert answer["visual_indices"].tolist() == [list(range(16))]
        assert same(answer, all_of_them)

    def test_tensorrt_rtx_compiles_it(self, tiny_bundle: Path, tmp_path: Path) -> None:
        """Triton runs TensorRT, which reads the same graph with the same parser but builds only on a GPU."""
        pytest.importorskip("tensorrt_rtx", reason="what stands in for TensorRT here")
        bundle = Bundle.open(tiny_bundle)
        file = bundle.graph_file(Precision.FP16)
        spec = spec_with_budget_shape(bundle.manifest.graphs["fp16"].spec)
        with (tmp_path / "engine").open("wb") as output:
            engine_from_onnx(
                file,
                spec,
                "tensorrt-rtx",
                output,
                profiles=resolve_profiles(spec, ["batch=1:2:4,text=1:8:16,budget=1:4:16"]),
                instead=graph_with_budget_shape(file).SerializeToString(),
                capabilities=[(8, 6)],
            )
        assert (tmp_path / "engine").stat().st_size > 100_000


class TestBatching:
    def test_requests_of_different_budgets_are_never_run_together(self, tiny_bundle: Path, tmp_path: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        own, served = own_graph(bundle), export(bundle, tmp_path / "repository", max_batch=4)
        random = np.random.default_rng(0)
        queue = []
        for seed in range(40):
            feeds = feeds_of(bundle, int(random.choice([3, 5])), [seed] * int(random.choice([1, 2])))
            length = int(random.choice([20, 24]))
            queue.append(feeds | {name: feeds[name][:, :length] for name in ("text_embeds", "text_mask")})
        answers = served.infer([as_keep(feeds) for feeds in queue])
        for feeds, answer in zip(queue, answers, strict=True):
            alone = own(feeds)
            assert np.array_equal(answer["visual_indices"], alone["visual_indices"])
            # Products of a larger batch are summed in another order.
            np.testing.assert_allclose(answer["visual_tokens"], alone["visual_tokens"], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(answer["scores"], alone["scores"], rtol=1e-3, atol=1e-4)
        assert max(served.batches) in (3, 4)
        assert sum(served.batches) == sum(len(feeds["text_mask"]) for feeds in queue)

    def test_a_queue_of_one_budget_fills_batches(self, tiny_bundle: Path, tmp_path: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        served = export(bundle, tmp_path / "repository")
        served.infer([as_keep(feeds_of(bundle, 4, [seed])) for seed in range(19)])
        assert served.batches == [8, 8, 3]

    def test_only_requests_that_may_be_joined_are(self, bundle: Bundle, tmp_path: Path) -> None:
        """Where the configuration allows no batches, joined requests would indeed be answered wrongly."""
        served = export(bundle, tmp_path / "repository")
        own = own_graph(bundle)
        requests = [feeds_of(bundle, 3, [seed]) for seed in (0, 1)]
        want = np.concatenate([own(feeds)["visual_tokens"] for feeds in requests])
        joined = {name: np.concatenate([feeds[name] for feeds in requests]) for name in requests[0] if name != "budget"}
        together = own(joined | {"budget": requests[0]["budget"]})["visual_tokens"]
        # Sums in another order stay within; the tokens of another image do not.
        assert np.allclose(together, want, atol=1e-4) == (served.config.max_batch_size > 0)
        answers = served.infer([as_keep(feeds) for feeds in requests])
        np.testing.assert_allclose(np.concatenate([each["visual_tokens"] for each in answers]), want, atol=1e-4)

    def test_padding_the_text_changes_nothing(self, tiny_bundle: Path, tmp_path: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        served = export(bundle, tmp_path / "repository")
        request = as_keep(feeds_of(bundle, 6, [3]))
        padded = request | {
            "text_embeds": np.pad(request["text_embeds"], ((0, 0), (0, 8), (0, 0))),
            "text_mask": np.pad(request["text_mask"], ((0, 0), (0, 8))),
        }
        short, long = served.infer([request, padded])
        assert np.array_equal(short["visual_indices"], long["visual_indices"])
        assert served.batches == [1, 1]


class TestConfiguration:
    def test_each_family_loads_and_warms_up(self, bundle: Bundle, tmp_path: Path) -> None:
        served = export(bundle, tmp_path / "repository")
        spec = bundle.manifest.graphs["fp32"].spec
        batches = bundle.manifest.dims.has_one_size
        assert served.config.max_batch_size == (spec.dim("batch").max if batches else 0)
        assert [warmup.batch_size for warmup in served.config.model_warmup] == ([1, 8] if batches else [1])
        assert [group.kind for group in served.config.instance_group] == [ModelInstanceGroup.KIND_AUTO]
        (keep,) = [tensor for tensor in served.config.input if tensor.name == "keep"]
        assert list(keep.dims) == ([-1] if batches else [-1, -1])
        served.warm_up()

    def test_what_was_asked_for_is_what_is_written(self, tiny_bundle: Path, tmp_path: Path) -> None:
        bundle = Bundle.open(tiny_bundle)
        config = export(
            bundle, tmp_path / "repository", name="vlm-1.5", max_batch=3, max_queue_delay_us=250, instances=2
        ).config
        assert (config.name, config.max_batch_size) == ("vlm-1.5", 3)
        assert config.dynamic_batching.max_queue_delay_microseconds == 250
        assert [group.count for group in config.instance_group] == [2]
        assert config.parameters["weights_sha256"].string_value == bundle.manifest.source.weights_sha256
        assert config.parameters["selector"].string_value == "flashvlm"

    def test_batches_of_one_have_no_batcher(self, tiny_bundle: Path, tmp_path: Path) -> None:
        served = export(Bundle.open(tiny_bundle), tmp_path / "repository", max_batch=1)
        assert not served.config.HasField("dynamic_batching")
        served.warm_up()

    def test_the_same_bundle_gives_the_same_bytes(self, tiny_bundle: Path, tmp_path: Path) -> None:
        first, second = (triton_repository(TritonSettings(tiny_bundle, tmp_path / name)).directory for name in "ab")
        for name in ("config.pbtxt", "1/model.onnx", "1/visual.fp32.onnx.data"):
            assert (first / name).read_bytes() == (second / name).read_bytes()


def add_engine(bundle: Bundle, profiles: list[str], *, for_triton: bool = True) -> Path:
    """Put a file in the place of an fp16 engine of TensorRT 10.3 for an L4."""
    file = engine_file(bundle, "l4", Precision.FP16, for_triton=for_triton)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"an engine")
    entry = EngineEntry(
        schema_version=SCHEMA_VERSION,
        target="l4",
        backend="tensorrt",
        backend_version="10.3.0",
        compute_capabilities=["8.9"],
        precision="fp16",
        graph_sha256=bundle.graph_sha256(Precision.FP16),
        engine_sha256=sha256_of(file),
        size_bytes=file.stat().st_size,
        profiles=[list(profile) for profile in resolve_profiles(bundle.manifest.graphs["fp16"].spec, profiles)],
        settings=BuildSettings(),
        build_s=1.0,
        peak_memory_bytes=1,
        census={},
        for_triton=for_triton,
    )
    write_entry(file, entry)
    return file


class TestEngine:
    def test_it_is_served_by_tensorrt(self, copy: Bundle, tmp_path: Path) -> None:
        add_engine(copy, ["batch=1:2:6"])
        model = triton_repository(TritonSettings(copy.path, tmp_path / "repository", engine="l4"))
        config = read_config(model.directory)
        assert (config.backend, config.max_batch_size) == ("tensorrt", 6)
        assert (model.backend_version, model.precision) == ("10.3.0", "fp16")
        assert (model.directory / "1" / "model.plan").read_bytes() == b"an engine"
        assert [path.name for path in (model.directory / "1").iterdir()] == ["model.plan"]
        inputs = {tensor.name: tensor for tensor in config.input}
        assert list(inputs["keep"].dims) == [-1]
        assert "budget" not in inputs
        (warmup,) = config.model_warmup
        assert warmup.batch_size == 2
        assert [group.kind for group in config.instance_group] == [ModelInstanceGroup.KIND_GPU]

    def test_profiles_of_larger_batches_than_allowed_are_not_warmed_up(self, copy: Bundle, tmp_path: Path) -> None:
        add_engine(copy, ["batch=1,text=1:8:16", "batch=2:4:8,text=1:64:256"])
        settings = TritonSettings(copy.path, tmp_path / "repository", engine="auto", max_batch=2)
        config = read_config(triton_repository(settings).directory)
        assert [warmup.batch_size for warmup in config.model_warmup] == [1]

    def test_the_build_that_is_named_has_a_graph(self, copy: Bundle, tmp_path: Path) -> None:
        """A bundle without the usual precision is not told to build in it."""
        del copy.manifest.graphs["fp16"]
        for for_triton in (False, True):
            with pytest.raises(BundleError, match="no such engine") as caught:
                find_engine(copy, for_triton=for_triton)
            assert "--precision fp32" in str(caught.value.hint)

    def test_triton_chooses_among_its_profiles(self, copy: Bundle, tmp_path: Path) -> None:
        profiles = ["batch=1,text=1:8:16", "batch=2:4:8,text=1:64:256"]
        add_engine(copy, profiles)
        settings = TritonSettings(copy.path, tmp_path / "repository", engine="auto", max_batch=4)
        config = read_config(triton_repository(settings).directory)
        (group,) = config.instance_group
        assert list(group.profile) == ["0", "1"]
        assert [warmup.batch_size for warmup in config.model_warmup] == [1, 4]
        for warmup, ranges in zip(config.model_warmup, find_engine(copy, for_triton=True).entry.profiles, strict=True):
            assert fits(warmup.inputs["text_mask"].dims, [next(dim.opt for dim in ranges if dim.name == "text")])

    def test_an_engine_of_the_runtime_is_not_one(self, copy: Bundle, tmp_path: Path) -> None:
        add_engine(copy, [], for_triton=False)
        with pytest.raises(BundleError, match="no such engine for Triton") as caught:
            triton_repository(TritonSettings(copy.path, tmp_path / "repository", engine="auto"))
        assert str(caught.value.hint).endswith("--for-triton")
        assert not (tmp_path / "repository").exists()

    def test_the_runtime_does_not_take_one_of_triton(self, copy: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
        add_engine(copy, [])
        with pytest.raises(BundleError, match="no such engine"):
            find_engine(copy)
        assert main(["inspect", str(copy.path)]) == 0
        assert "engines/l4.fp16.triton.engine" in capsys.readouterr().out

    def test_a_damaged_engine(self, copy: Bundle, tmp_path: Path) -> None:
        add_engine(copy, []).write_bytes(b"an Engine")
        with pytest.raises(BundleError, match="damaged") as caught:
            triton_repository(TritonSettings(copy.path, tmp_path / "repository", engine="l4"))
        assert "--for-triton --overwrite" in str(caught.value.hint)
        with pytest.raises(BundleError):
            check_engine(copy, find_engine(copy, for_triton=True))

    def test_batches_that_it_was_not_built_for(self, copy: Bundle, tmp_path: Path) -> None:
        add_engine(copy, ["batch=1:1:2"])
        with pytest.raises(ConfigError, match="smaller batches") as caught:
            triton_repository(TritonSettings(copy.path, tmp_path / "repository", engine="l4", max_batch=3))
        assert "--profile batch=1:1:3" in str(caught.value.hint)

    def test_a_build_reads_the_graph_whose_budget_is_a_shape(
        self, copy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a builder in the place of TensorRT's, which needs a GPU; its own calls are tested elsewhere."""
        built: dict[str, Any] = {}

        def build(file: Path, spec: GraphSpec, backend: str, output: BinaryIO, **more: Any) -> BuildReport:
            built.update(more, file=file, spec=spec, backend=backend)
            output.write(b"an engine")
            return BuildReport({}, None)

        monkeypatch.setattr(engine_from_bundle_module, "engine_from_onnx", build)
        monkeypatch.setattr(engine_from_bundle_module, "gpu_at_hand", lambda: Gpu("NVIDIA L4", (8, 9), 24 << 30))
        monkeypatch.setattr(tensorrt_api, "is_installed", lambda backend: True)
        monkeypatch.setattr(tensorrt_api, "load", lambda backend: SimpleNamespace(__version__="10.13.3.9"))
        engine = engine_from_bundle(EngineSettings(copy.path, target="l4", for_triton=True))
        assert (built["backend"], built["file"]) == ("tensorrt", copy.path / "visual.fp16.onnx")
        assert [tensor.name for tensor in built["spec"].inputs][-1] == "keep"
        assert [value.name for value in onnx.load_from_string(built["instead"]).graph.input][-1] == "keep"
        assert engine.file.name == "l4.fp16.triton.engine"
        settings = TritonSettings(copy.path, tmp_path / "repository", engine="auto")
        assert triton_repository(settings).backend_version == "10.13.3.9"

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"backend": "tensorrt-rtx"}, "no backend for TensorRT-RTX"),
            ({"build": BuildSettings(strip_weights=True)}, "does not put weights back"),
        ],
    )
    def test_builds_that_triton_cannot_serve(self, copy: Bundle, more: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            engine_from_bundle(EngineSettings(copy.path, target="rtx-40", for_triton=True, **more))


class TestRepository:
    def test_other_models_are_left_alone(self, tiny_bundle: Path, tmp_path: Path) -> None:
        other = tmp_path / "repository" / "other" / "config.pbtxt"
        other.parent.mkdir(parents=True)
        other.write_text("of somebody else")
        triton_repository(TritonSettings(tiny_bundle, tmp_path / "repository"))
        assert sorted(path.name for path in (tmp_path / "repository").iterdir()) == ["flashvlm", "other"]
        assert other.read_text() == "of somebody else"

    def test_a_model_is_replaced_only_when_told_and_only_ours(self, tiny_bundle: Path, tmp_path: Path) -> None:
        settings = TritonSettings(tiny_bundle, tmp_path)
        directory = triton_repository(settings).directory
        with pytest.raises(StorageError, match="has a model of this name") as caught:
            triton_repository(settings)
        assert "--overwrite" in str(caught.value.expected)
        triton_repository(TritonSettings(tiny_bundle, tmp_path, max_batch=2, overwrite=True))
        assert read_config(directory).max_batch_size == 2
        (directory / "config.pbtxt").write_text('name: "flashvlm"')
        with pytest.raises(StorageError, match="has a model of this name"):
            triton_repository(TritonSettings(tiny_bundle, tmp_path, overwrite=True))

    def test_what_the_user_added_is_not_lost(self, tiny_bundle: Path, tmp_path: Path) -> None:
        directory = triton_repository(TritonSettings(tiny_bundle, tmp_path)).directory
        (directory / "2").mkdir()
        (directory / "2" / "model.onnx").write_bytes(b"another version")
        with pytest.raises(StorageError, match="more than this command wrote") as caught:
            triton_repository(TritonSettings(tiny_bundle, tmp_path, overwrite=True))
        assert caught.value.received == f"{directory}: 2"
        assert (directory / "2" / "model.onnx").read_bytes() == b"another version"

    def test_a_full_disk_leaves_the_old_model(
        self, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = triton_repository(TritonSettings(tiny_bundle, tmp_path)).directory
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

        def fill(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module_under_test.shutil, "copyfileobj", fill)
        with pytest.raises(StorageError, match="disk is full"):
            triton_repository(TritonSettings(tiny_bundle, tmp_path, max_batch=2, overwrite=True))
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["flashvlm"]

    def test_damaged_weights(self, copy: Bundle, tmp_path: Path) -> None:
        file = copy.path / "visual.fp32.onnx.data"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        with pytest.raises(BundleError, match="damaged"):
            triton_repository(TritonSettings(copy.path, tmp_path / "repository"))
        assert not (tmp_path / "repository").exists()


class TestCommand:
    def test_json(self, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            main(["export-triton", str(tiny_bundle), "--output", str(tmp_path), "--precision", "fp16", "--json"]) == 0
        )
        printed = json.loads(capsys.readouterr().out)
        assert printed["model"] == str(tmp_path / "flashvlm")
        assert (printed["backend"], printed["precision"], printed["max_batch"]) == ("onnxruntime", "fp16", 8)
        for name, size_bytes in printed["files"].items():
            assert (tmp_path / name).stat().st_size == size_bytes
        assert printed["command"] == f"tritonserver --model-repository={tmp_path}"

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["--precision", "int8"], 2, "no visual graph in this precision"),
            (["--engine"], 1, "no such engine for Triton"),
            (["--engine", "l4"], 1, "--target l4 --for-triton"),
            (["--max-batch", "0"], 2, "--max-batch is out of range"),
            (["--max-queue-delay-us", "-1"], 2, "--max-queue-delay-us is out of range"),
            (["--max-batch", "1", "--max-queue-delay-us", "9"], 2, "waits for nobody"),
            (["--instances", "0"], 2, "--instances is out of range"),
            (["--name", "../outside"], 2, "not a name of a model"),
            (["--name", ".hidden"], 2, "not a name of a model"),
        ],
    )
    def test_what_is_refused(
        self,
        tiny_bundle: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        code: int,
        said: str,
    ) -> None:
        output = tmp_path / "repository"
        assert main(["export-triton", str(tiny_bundle), "--output", str(output), *arguments]) == code
        message = capsys.readouterr().err
        assert said in message
        assert "Traceback" not in message
        assert not output.exists()

    def test_a_bundle_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["export-triton", str(tmp_path / "none"), "--output", str(tmp_path / "repository")]) == 1
        assert "there is no bundle at this path" in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--max-batch", "--max-queue-delay-us"])
    def test_batches_of_a_family_that_has_none(
        self, qwen_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
    ) -> None:
        assert main(["export-triton", str(qwen_bundle), "--output", str(tmp_path / "repository"), option, "4"]) == 2
        assert "cannot put requests to this model together" in capsys.readouterr().err


class TestClient:
    """examples/triton_client.py, over gRPC."""

    def test_answers_are_those_of_the_bundle_alone(self, bundle: Bundle, tmp_path: Path, example: Any) -> None:
        requests = [Request([picture((90, 60))], "What is this?"), Request([picture((64, 64))], "Is there a dog here?")]
        budget = max(1, bundle.manifest.dims.least_patches // 2)
        with Pipeline.open(bundle) as pipeline:
            want = [greedy(pipeline, prompt) for prompt in pipeline.encode(requests, budget=budget)]
        served = export(bundle, tmp_path / "repository")
        pipeline = Pipeline.open(bundle)
        with serving(served) as url:
            pipeline.session = example.TritonSession(bundle, url)
            with pipeline:
                have = [greedy(pipeline, prompt) for prompt in pipeline.encode(requests, budget=budget)]
        assert have == want
        assert sum(served.batches) == len(requests)

    def test_the_dtype_is_the_servers(self, tiny_bundle: Path, tmp_path: Path, example: Any) -> None:
        bundle = Bundle.open(tiny_bundle)
        with serving(export(bundle, tmp_path / "repository", precision=Precision.FP16)) as url:
            session = example.TritonSession(bundle, url)
            feeds = feeds_of(bundle, 4, [0, 1], Precision.FP16)
            with session:
                assert session.run(feeds).tokens.dtype == np.float16

    def test_more_images_than_the_server_takes_at_once(self, copy: Bundle, tmp_path: Path, example: Any) -> None:
        served = export(copy, tmp_path / "repository", max_batch=2)
        feeds = feeds_of(copy, 4, [0, 1, 2, 3, 4])
        want = own_graph(copy)(feeds)
        with serving(served) as url, example.TritonSession(copy, url) as session:
            have = session.run(feeds)
        assert served.batches == [2, 2, 1]
        assert np.array_equal(have.indices, want["visual_indices"])
        np.testing.assert_allclose(have.tokens, want["visual_tokens"], rtol=1e-4, atol=1e-5)

    def test_a_client_closes_what_it_opened(
        self, copy: Bundle, tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed: list[bool] = []
        made = []  # what is thrown away closes itself

        class Client(example.triton.InferenceServerClient):  # type: ignore[misc, name-defined]  # loaded from its file
            def __init__(self, url: str) -> None:
                super().__init__(url)
                made.append(self)

            def close(self) -> None:
                closed.append(True)
                super().close()

        monkeypatch.setattr(example.triton, "InferenceServerClient", Client)
        with serving(export(copy, tmp_path / "repository")) as url:
            with example.TritonSession(copy, url):
                assert closed == []
            assert closed == [True]
            with pytest.raises(SessionError, match="does not have this model"):
                example.TritonSession(copy, url, "other").open()
        assert closed == [True, True]

    def test_a_server_that_is_not_there(self, copy: Bundle, tmp_path: Path) -> None:
        picture((90, 60)).save(tmp_path / "photo.png")
        with socket.socket() as deaf:  # holds a port, and listens to nobody
            deaf.bind(("127.0.0.1", 0))
            url = f"127.0.0.1:{deaf.getsockname()[1]}"
            script = [sys.executable, str(ROOT / "examples" / "triton_client.py"), str(copy.path)]
            command = [*script, str(tmp_path / "photo.png"), "What?", "--url", url]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT)
        assert done.returncode == 1
        assert "triton_client.py: the server cannot be reached" in done.stderr
        assert url in done.stderr
        assert "Traceback" not in done.stderr

    def test_another_checkpoint_and_another_name(
        self, copy: Bundle, next_bundle: Path, tmp_path: Path, example: Any
    ) -> None:
        with serving(export(copy, tmp_path / "repository")) as url:
            with pytest.raises(SessionError, match="another checkpoint"):
                example.TritonSession(Bundle.open(next_bundle), url).open()
            with pytest.raises(SessionError, match="does not have this model") as caught:
                example.TritonSession(copy, url, "other").open()
        assert "flashvlm export-triton" in str(caught.value.hint)
