"""The exported decoder against transformers, which shares no code with it, and everything that can go wrong before."""

from __future__ import annotations

import socketserver
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from helpers.tiny_llava import make_config
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from flashvlm_export.errors import CheckpointError, ConfigError, DependencyError, ExportError
from flashvlm_export.export import decoder
from flashvlm_export.export.decoder import export_decoder

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_model(config: Any) -> PreTrainedModel:
    """A seeded causal LM whose activations keep their size, so that every layer matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.3)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            elif name != "lm_head.weight" or not config.tie_word_embeddings:
                parameter.normal_(0, 1.2 / parameter.shape[1] ** 0.5)
    return model


def stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint of ``model`` holds: a tied output layer is not stored."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def prefill_logits(file: Path, entry: Any, embeds: torch.Tensor, positions: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {
        "inputs_embeds": embeds.numpy(),
        "attention_mask": np.ones(embeds.shape[:2], np.int64),
        "position_ids": positions.numpy(),
    }
    empty = np.zeros((len(embeds), entry.num_kv_heads, 0, entry.head_size), np.float32)
    feeds.update({value.name: empty for value in session.get_inputs() if value.name.startswith("past")})
    logits = session.run(["logits"], feeds)[0]
    assert logits.shape == (len(embeds), 1, SIZES["vocab_size"])  # the last position's only
    return logits[:, 0]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LlamaConfig(**SIZES, tie_word_embeddings=True), id="llama-tied"),
        pytest.param(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, attention_bias=True), id="llama3-rope-bias"),
        pytest.param(MistralConfig(**SIZES, sliding_window=40), id="mistral-window"),
        pytest.param(Qwen2Config(**SIZES), id="qwen2"),
        pytest.param(Qwen3Config(**SIZES, head_dim=32), id="qwen3-wide-heads"),
        pytest.param(
            LlamaConfig(**SIZES, head_dim=12, rope_parameters=LLAMA3_ROPE, attention_bias=True), id="llama-padded-heads"
        ),
        pytest.param(Qwen2Config(**{**SIZES, "num_attention_heads": 8}), id="qwen2-padded-heads"),
    ],
)
def test_logits_equal_transformers(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoder, "_SHARD_BYTES", 50_000)  # so that there are several shards
    model = make_model(config)
    entry = export_decoder(config, iter(stored(model).items()), tmp_path / "llm", "fp32")

    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "llm",
        "llm/model.onnx",
        "llm/model.onnx.data",
    ]
    captured = capfd.readouterr()
    assert captured.out == ""  # `--json` prints there
    # The builder's own commit, and not that of the repository that the environment lies in: the same weights give the
    # same file everywhere.
    commit = onnx.load(tmp_path / entry.file, load_external_data=False).producer_version.partition("+")[2]
    assert commit in ("", (onnxruntime_genai.__commit__ or "")[:7])
    assert (entry.file, entry.precision) == ("llm/model.onnx", "fp32")
    assert (entry.num_layers, entry.num_kv_heads) == (2, 2)
    assert entry.max_positions == (40 if isinstance(config, MistralConfig) else 256)

    embeds = torch.randn(2, 40, 64)
    counted = torch.arange(40).expand(2, 40)
    # Others in each row. The mask tells transformers that a gap is not the start of another sequence.
    gaps = counted[:, :20] + (counted[:, :20] > 8) * torch.tensor([[6], [20]])
    seen = []
    for positions in (counted, counted[:, :20], gaps):
        rows, ones = embeds[:, : positions.shape[1]], torch.ones(positions.shape, dtype=torch.int64)
        with torch.no_grad():
            logits = model(inputs_embeds=rows, position_ids=positions, attention_mask=ones).logits[:, -1].numpy()
        seen.append(logits)
        # Both compute in float32 and only sum in another order: 1e-5 of the largest logit, which is 4 to 20 here.
        actual = prefill_logits(tmp_path / entry.file, entry, rows, positions)
        np.testing.assert_allclose(actual, logits, rtol=0, atol=1e-4 * np.abs(logits).max())
    assert np.abs(seen[1] - seen[2]).max() > 0.01 * np.abs(seen[1]).max(), "positions that make no difference"


def test_weights_keep_their_dtype_whatever_the_configuration_says(tmp_path: Path) -> None:
    config = make_config(llm_width=64).text_config
    model = make_model(config)
    config.dtype = torch.float16
    entry = export_decoder(config, stored(model).items(), tmp_path / "llm", "fp32")
    embeds = torch.randn(1, 9, 64)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits[:, -1].numpy()
    # Weights that went through half precision are off by 1e-3.
    np.testing.assert_allclose(
        prefill_logits(tmp_path / entry.file, entry, embeds, torch.arange(9)[None]), expected, rtol=0, atol=1e-4
    )
    assert config.dtype == torch.float16, "the caller's configuration was changed"


class _Connections(socketserver.ThreadingTCPServer):
    asked: ClassVar[list[bytes]] = []

    def verify_request(self, request: Any, client_address: Any) -> bool:
        request.settimeout(5)
        self.asked.append(request.recv(200))
        return False


def test_nothing_is_asked_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**SIZES)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with _Connections(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, url)
        export_decoder(config, stored(make_model(config)).items(), tmp_path / "llm", "int4")
        server.shutdown()
        assert server.asked == []


def test_weights_are_held_one_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**SIZES)
    shard_bytes = 100_000
    monkeypatch.setattr(decoder, "_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(decoder, "_run_builder", lambda *_: (_ for _ in ()).throw(ExportError("far enough")))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored(make_model(config)).items()}
    alive: weakref.WeakValueDictionary[str, np.ndarray] = weakref.WeakValueDictionary()
    most = 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, shape in shapes.items():
            array = np.zeros(shape, np.float32)
            alive[name] = array  # a tensor made from it keeps it alive as long as its memory is in use
            most = max(most, sum(each.nbytes for each in alive.values()))
            tensor = torch.from_numpy(array)
            del array
            yield name, tensor
            del tensor

    with pytest.raises(ExportError, match="far enough"):
        export_decoder(config, tensors(), tmp_path / "llm", "fp32")
    largest = max(int(np.prod(shape)) * 4 for shape in shapes.values())
    assert most <= shard_bytes + 2 * largest < sum(int(np.prod(shape)) * 4 for shape in shapes.values())


def untouched() -> Iterator[tuple[str, torch.Tensor]]:
    pytest.fail("weights were read")
    yield


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTNeoXConfig(hidden_size=64, num_attention_heads=4), "text model of type 'gpt_neox'"),
        (Qwen3Config(**SIZES, head_dim=24), "head size 24 in a model of type 'qwen3'"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
            "rope type 'linear'",
        ),
    ],
    ids=["architecture", "head-size", "rope"],
)
def test_what_has_no_onnx_form_is_refused_before_weights_are_read(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_decoder(config, untouched(), tmp_path / "llm", "fp32")
    assert caught.value.expected
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_unknown_precision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int3"):
        export_decoder(LlamaConfig(**SIZES), untouched(), tmp_path / "llm", "int3")


def test_missing_builder_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = decoder.importlib.util.find_spec
    monkeypatch.setattr(
        decoder.importlib.util, "find_spec", lambda name: None if name == "onnxruntime_genai" else find_spec(name)
    )
    with pytest.raises(DependencyError, match=r"pip install '\.\[llm\]'"):
        export_decoder(LlamaConfig(**SIZES), untouched(), tmp_path / "llm", "fp32")


def _without(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [item for item in tensors.items() if item[0] != "model.layers.1.mlp.up_proj.weight"]


def _with_stranger(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [*tensors.items(), ("model.layers.7.mlp.up_proj.weight", torch.zeros(96, 64))]


def _with_twin(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"])]


def _misshapen(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [*{**tensors, "model.norm.weight": torch.zeros(63)}.items()]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "1 missing: model.layers.1.mlp.up_proj.weight"),
        (_with_stranger, "model.layers.7.mlp.up_proj.weight"),
        (_with_twin, "twice"),
        (_misshapen, r"\[63\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES)
    with pytest.raises(CheckpointError, match=message):
        export_decoder(config, damage(stored(make_model(config))), tmp_path / "llm", "fp32")
    assert not list(tmp_path.rglob("*model*")), "something was left behind"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'reading layer 0'; echo 'ValueError: no such thing' >&2; exit 3", "(?s)exit code 3.*no such thing.*pip"),
        ("kill -9 $$", "(?s)killed by SIGKILL.*memory"),
    ],
)
def test_a_failing_builder_is_reported_and_cleaned_up(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    config = LlamaConfig(**SIZES)
    with pytest.raises(ExportError, match=message):
        export_decoder(config, stored(make_model(config)).items(), tmp_path / "bundle" / "llm", "fp32")
    assert not list((tmp_path / "bundle" / "llm").iterdir())
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["llm"]
    assert capfd.readouterr().out == ""


def test_weights_that_fail_while_they_are_read_leave_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.norm.weight", torch.ones(64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_decoder(LlamaConfig(**SIZES), tensors(), tmp_path / "llm", "fp32")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
