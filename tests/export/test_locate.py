"""Where weights come from: a directory, the cache, the hub, a seed, or one clear error. Nothing here uses a network."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from flashvlm_export.errors import CheckpointError, ConfigError
from flashvlm_export.export import locate
from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint
from flashvlm_export.export.checkpoint import INDEX, SINGLE, Checkpoint
from flashvlm_export.export.locate import open_weights
from flashvlm_export.models import MODELS
from flashvlm_export.specs import Precision

REPO = "llava-hf/llava-1.5-7b-hf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens, the connection is refused at once


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_cache(cache: Path, checkpoint: Path, repo: str = REPO) -> Path:
    """Put a checkpoint where ``snapshot_download`` keeps what it has downloaded."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(checkpoint, place / "snapshots" / COMMIT)


def shard(snapshot: Path) -> None:
    """Split the weights of a checkpoint over two files."""
    tensors = load_file(snapshot / SINGLE)
    (snapshot / SINGLE).unlink()
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, snapshot / file)
    index = ", ".join(f'"{name}": "{file}"' for name, file in files.items())
    (snapshot / INDEX).write_text('{"weight_map": {' + index + "}}")


def assert_cannot_be_had(error: CheckpointError, reason: str) -> None:
    assert error.what == f"the weights of {REPO} cannot be had"
    assert reason in str(error.received)
    assert "\n" not in str(error.received)
    for way in (f"hf download {REPO} --local-dir DIR", "--weights DIR", "--weights random"):
        assert way in str(error.hint)


class TestDirectory:
    @pytest.mark.parametrize("model", ["anything", "llava-1.5-7b", REPO])
    def test_weights_names_a_directory(self, tiny_checkpoint: Path, model: str) -> None:
        weights = open_weights(model, str(tiny_checkpoint))
        assert (weights.directory, weights.label) == (tiny_checkpoint, "checkpoint")

    @pytest.mark.parametrize("weights", ["auto", "{directory}"])
    def test_a_directory_has_no_revisions(self, tiny_checkpoint: Path, weights: str) -> None:
        directory = str(tiny_checkpoint)
        with pytest.raises(ConfigError, match="a revision belongs to the hub") as caught:
            open_weights(directory, weights.format(directory=directory), revision="v2")
        assert "--revision v2" in str(caught.value.received)

    def test_the_model_is_a_directory(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert open_weights(str(tiny_checkpoint), "auto").directory == tiny_checkpoint
        monkeypatch.chdir(tiny_checkpoint.parent)
        assert open_weights(tiny_checkpoint.name, "auto").directory == Path(tiny_checkpoint.name)

    @pytest.mark.parametrize("model", ["./missing", "../missing", "/missing/dir", "~/missing", "a/b/c", "missing/"])
    def test_a_path_that_is_not_there_is_not_asked_of_the_hub(self, model: str) -> None:
        with pytest.raises(CheckpointError, match="no checkpoint in this directory") as caught:
            open_weights(model, "auto")
        assert "does not exist" in str(caught.value.received)

    @pytest.mark.parametrize("weights", ["missing", "Auto", "randomly"])
    def test_weights_that_are_no_directory(self, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="no checkpoint in this directory") as caught:
            open_weights("llava-1.5-7b", weights)
        assert weights in str(caught.value.received)


class TestUnknownModel:
    @pytest.mark.parametrize("model", ["llava", "gpt-4", "LLaVA-1.5-7B", "", " ", "llava-1.5-7b "])
    def test_what_is_known_is_told(self, model: str) -> None:
        with pytest.raises(ConfigError, match="unknown model") as caught:
            open_weights(model, "auto")
        assert caught.value.received == repr(model)
        for name in MODELS:
            assert name in str(caught.value.expected)
        assert "flashvlm models" in str(caught.value.hint)
        assert caught.value.exit_code == 2


class TestRandom:
    @pytest.mark.parametrize(
        ("weights", "label"),
        [("random", "random:0"), ("random:0", "random:0"), ("random:17", "random:17"), ("random:007", "random:7")],
    )
    @pytest.mark.parametrize("model", ["llava-1.5-7b", "llava-hf/llava-1.5-13b-hf"])
    def test_a_registered_model_needs_no_files(self, model: str, weights: str, label: str) -> None:
        source = open_weights(model, weights)
        assert (source.label, source.directory) == (label, None)
        assert source.config["model_type"] == "llava"

    @pytest.mark.parametrize("model", ["some/model", "unknown"])
    def test_other_models_have_no_sizes(self, model: str) -> None:
        with pytest.raises(ConfigError, match="random weights need a registered model") as caught:
            open_weights(model, "random")
        assert caught.value.received == model
        assert "llava-1.5-7b" in str(caught.value.expected)

    def test_a_directory_is_no_registered_model(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ConfigError, match="registered model"):
            open_weights(str(tiny_checkpoint), "random")

    @pytest.mark.parametrize("seed", ["x", "-1", "1.5", " 1", "²", "0x10"])
    def test_a_seed_that_is_no_number(self, seed: str) -> None:
        with pytest.raises(ConfigError, match="not a whole number") as caught:
            open_weights("llava-1.5-7b", f"random:{seed}")
        assert caught.value.received == f"random:{seed}"
        assert "random:SEED" in str(caught.value.expected)

    @pytest.mark.parametrize("decoder", ["fp32", "fp16", "int8", "int4"])
    def test_a_decoder_of_random_weights_is_refused(self, decoder: str, tmp_path: Path) -> None:
        settings = ExportSettings("llava-1.5-7b", tmp_path / "out", weights="random", decoder=decoder)
        with pytest.raises(ConfigError, match="random weights"):
            bundle_from_checkpoint(settings)
        assert not (tmp_path / "out").exists()


class TestCache:
    @pytest.mark.parametrize("sharded", [False, True])
    @pytest.mark.parametrize("model", ["llava-1.5-7b", REPO])
    def test_a_whole_snapshot_needs_no_hub(self, cache: Path, tiny_checkpoint: Path, model: str, sharded: bool) -> None:
        snapshot = fill_cache(cache, tiny_checkpoint)
        if sharded:
            shard(snapshot)
        weights = open_weights(model, "auto")
        assert isinstance(weights, Checkpoint)
        assert weights.directory == snapshot

    def test_any_hub_id_can_be_cached(self, cache: Path, tiny_checkpoint: Path) -> None:
        snapshot = fill_cache(cache, tiny_checkpoint, "someone/their-llava.v2")
        assert open_weights("someone/their-llava.v2", "auto").directory == snapshot

    @pytest.mark.parametrize("missing", ["weights", "one shard", "index"])
    def test_a_download_that_broke_off_is_not_taken_for_a_checkpoint(
        self, cache: Path, tiny_checkpoint: Path, missing: str
    ) -> None:
        snapshot = fill_cache(cache, tiny_checkpoint)
        if missing == "weights":
            (snapshot / SINGLE).unlink()
        else:
            shard(snapshot)
            (snapshot / (INDEX if missing == "index" else "model-1.safetensors")).unlink()
        with pytest.raises(CheckpointError) as caught:
            open_weights("llava-1.5-7b", "auto")
        assert_cannot_be_had(caught.value, "not whole in the local Hugging Face cache")

    def test_another_revision_is_another_snapshot(self, cache: Path, tiny_checkpoint: Path) -> None:
        fill_cache(cache, tiny_checkpoint)
        with pytest.raises(CheckpointError) as caught:
            open_weights("llava-1.5-7b", "auto", revision="v2")
        assert_cannot_be_had(caught.value, "not whole in the local Hugging Face cache")
        assert open_weights("llava-1.5-7b", "auto", revision=COMMIT).directory is not None


@contextlib.contextmanager
def silent_hub() -> Iterator[str]:
    """A hub behind a firewall that swallows what it is sent: connections open, answers never come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class TestUnreachableHub:
    def test_offline(self) -> None:
        with pytest.raises(CheckpointError) as caught:
            open_weights("llava-1.5-7b", "auto")
        assert_cannot_be_had(caught.value, "offline mode is enabled")

    def test_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(CheckpointError) as caught:
            open_weights("llava-1.5-7b", "auto")
        assert_cannot_be_had(caught.value, "ConnectError")

    def test_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(locate, "_HUB_TIMEOUT_S", 0.3)
        start = time.perf_counter()
        with silent_hub() as endpoint:
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            with pytest.raises(CheckpointError) as caught:
                open_weights("llava-1.5-7b", "auto")
        assert_cannot_be_had(caught.value, "imeout")
        # Generous on a busy machine; without a limit the hub's own client waits for ever.
        assert time.perf_counter() - start < 10

    def test_an_export_ends_before_it_writes(self, tmp_path: Path) -> None:
        settings = ExportSettings("llava-1.5-7b", tmp_path / "deep" / "out", precisions=[Precision.FP32])
        with pytest.raises(CheckpointError) as caught:
            bundle_from_checkpoint(settings)
        assert_cannot_be_had(caught.value, "offline mode is enabled")
        assert not (tmp_path / "deep").exists()
