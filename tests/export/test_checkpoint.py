"""Checkpoints as they are found in the world: generations of names, shards, half precision, all kinds of damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashvlm_export.errors import CheckpointError, StorageError
from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint
from flashvlm_export.export.checkpoint import INDEX, SINGLE, Checkpoint, RandomWeights
from flashvlm_export.export.text_model import text_model_tensors, write_text_embeddings
from flashvlm_export.export.visual_graph import VisualGraph, build_visual_graph
from flashvlm_export.files import atomic_directory
from flashvlm_export.models import MODELS, adapter_class
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.progress import Progress
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import Precision, VisualDims

FC1 = "vision_tower.encoder.layers.0.mlp.fc1.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"

# Names as transformers 5.23 writes them → names that other versions wrote for the same tensors.
GENERATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "before 4.52": ((r"^vision_tower\.", "vision_tower.vision_model."),),
    "since 4.52": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
    "in the memory of 5.x": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
}


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    return adapter_class(config["model_type"])(config)


def open_checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint(directory, adapter_class("llava").canonical)


def build(directory: Path, precision: Precision = Precision.FP32) -> tuple[VisualGraph, Checkpoint]:
    weights = open_checkpoint(directory)
    selector = get_selector("flashvlm")
    config = selector.make_config({})
    return build_visual_graph(adapter_of(weights.config), weights, selector, config, precision), weights


def read_all(directory: Path, embeddings: Path) -> tuple[dict[str, Tensor], Any, dict[str, Tensor], str]:
    """Everything an export reads: visual side, embedding table, text model, and the fingerprint over it."""
    module, weights = build(directory)
    adapter = adapter_of(weights.config)
    write_text_embeddings(embeddings, adapter, weights)
    text = dict(text_model_tensors(adapter, weights, Progress()))
    return module.state_dict(), np.load(embeddings), text, weights.fingerprint()


def save(directory: Path, tensors: Mapping[str, Tensor], shards: Callable[[str], str] | None = None) -> Path:
    """Replace the weights of a checkpoint; ``shards`` tells which file a tensor goes to."""
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    if shards is None:
        save_file(dict(tensors), directory / SINGLE)
        return directory
    weight_map = {name: shards(name) for name in tensors}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, directory / shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def by_part(name: str) -> str:
    return "text.safetensors" if name.startswith("language_model.") and name != EMBEDDING else "rest.safetensors"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def tensors(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_file(tiny_checkpoint / SINGLE)


def refuse_export(checkpoint: Path, *, precision: Precision = Precision.FP32) -> str:
    """Export ``checkpoint`` as the command does; return the message, and make sure that nothing is left behind."""
    output = checkpoint.parent / "out" / "bundle"
    settings = ExportSettings(str(checkpoint), output, precisions=[precision], decoder="none", engine_check="off")
    with pytest.raises(CheckpointError) as caught:
        bundle_from_checkpoint(settings)
    assert caught.value.received is not None
    assert caught.value.expected is not None or caught.value.hint is not None
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    return str(caught.value)


def edit_config(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (checkpoint / "config.json").write_text(json.dumps(config))


class TestEquivalentLayouts:
    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_every_generation_of_names_gives_the_same(
        self, checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path, generation: str
    ) -> None:
        renamed = {}
        for name, tensor in tensors.items():
            new = name
            for pattern, replacement in GENERATIONS[generation]:
                new = re.sub(pattern, replacement, new)
            renamed[new] = tensor
        assert len(renamed) == len(tensors)
        assert renamed.keys() != tensors.keys()
        self._assert_same(checkpoint, renamed, None, tmp_path)

    @pytest.mark.parametrize("layout", ["by part", "one tensor each"])
    def test_shards_give_the_same_as_one_file(
        self, checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path, layout: str
    ) -> None:
        numbers = {name: f"model-{number:05d}.safetensors" for number, name in enumerate(tensors)}
        self._assert_same(checkpoint, tensors, by_part if layout == "by part" else numbers.__getitem__, tmp_path)

    def _assert_same(
        self, checkpoint: Path, new: dict[str, Tensor], shards: Callable[[str], str] | None, tmp_path: Path
    ) -> None:
        want = read_all(checkpoint, tmp_path / "want.npy")
        have = read_all(save(checkpoint, new, shards), tmp_path / "have.npy")
        torch.testing.assert_close(have[0], want[0], rtol=0, atol=0)
        np.testing.assert_array_equal(have[1], want[1])
        torch.testing.assert_close(have[2], want[2], rtol=0, atol=0)
        assert have[3] == want[3]

    def test_what_is_read_is_what_the_file_holds(
        self, tiny_checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path
    ) -> None:
        visual, table, text, _ = read_all(tiny_checkpoint, tmp_path / "table.npy")
        torch.testing.assert_close(visual[f"encoder.{FC1}"], tensors[FC1], rtol=0, atol=0)
        np.testing.assert_array_equal(table, tensors[EMBEDDING].numpy())
        assert {f"language_model.{name}" for name in text} == {n for n in tensors if n.startswith("language_model.")}
        for name, tensor in text.items():
            torch.testing.assert_close(tensor, tensors[f"language_model.{name}"], rtol=0, atol=0)

    def test_one_changed_value_changes_the_fingerprint(self, checkpoint: Path, tensors: dict[str, Tensor]) -> None:
        before = build(checkpoint)[1].fingerprint()
        changed = tensors[FC1].clone()
        changed[0, 0] += 1e-3
        assert build(save(checkpoint, tensors | {FC1: changed}))[1].fingerprint() != before

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
    def test_half_precision_checkpoints(
        self, checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype, precision: Precision
    ) -> None:
        halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        module, weights = build(save(checkpoint, halves), precision)
        want = halves[FC1].to(getattr(torch, precision.float_dtype))
        torch.testing.assert_close(module.state_dict()[f"encoder.{FC1}"], want, rtol=0, atol=0)
        write_text_embeddings(tmp_path / "table.npy", adapter_of(weights.config), weights)
        table = np.load(tmp_path / "table.npy", mmap_mode="r")
        # bfloat16 has values below float16's smallest; NumPy has no bfloat16.
        assert table.dtype == (np.float16 if dtype == torch.float16 else np.float32)
        np.testing.assert_array_equal(table.astype(np.float32), halves[EMBEDDING].float().numpy())


class TestLaziness:
    """Only what is asked for is read: the shard of the language model may even be missing, or damaged."""

    @pytest.mark.parametrize("state", ["missing", "truncated", "NaN"])
    def test_the_visual_graph_does_not_touch_the_language_model(
        self, checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path, state: str
    ) -> None:
        want = build(checkpoint)[0].state_dict()
        new = {n: torch.full_like(t, torch.nan) if by_part(n)[0] == "t" else t for n, t in tensors.items()}
        save(checkpoint, new if state == "NaN" else tensors, by_part)
        shard = checkpoint / "text.safetensors"
        if state == "missing":
            shard.unlink()
        elif state == "truncated":
            shard.write_bytes(shard.read_bytes()[:-100])
        module, weights = build(checkpoint)
        torch.testing.assert_close(module.state_dict(), want, rtol=0, atol=0)
        adapter = adapter_of(weights.config)
        write_text_embeddings(tmp_path / "table.npy", adapter, weights)
        np.testing.assert_array_equal(np.load(tmp_path / "table.npy"), tensors[EMBEDDING].numpy())
        problem = {"missing": "shard is missing", "truncated": "shard cannot be read", "NaN": "holds NaN"}[state]
        with pytest.raises(CheckpointError, match=problem):
            list(text_model_tensors(adapter, weights, Progress()))

    def test_layers_above_the_feature_layer_are_not_needed(self, checkpoint: Path, tensors: dict[str, Tensor]) -> None:
        want = build(checkpoint)[0].state_dict()
        unused = ("vision_tower.encoder.layers.3.", "vision_tower.post_layernorm.")
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
        assert len(rest) < len(tensors)
        torch.testing.assert_close(build(save(checkpoint, rest))[0].state_dict(), want, rtol=0, atol=0)


class TestDamagedWeights:
    def test_no_weights(self, checkpoint: Path) -> None:
        (checkpoint / SINGLE).unlink()
        message = refuse_export(checkpoint)
        assert "no safetensors weights" in message
        assert "no weight files" in message
        assert SINGLE in message

    def test_only_pickled_weights_are_not_read(self, checkpoint: Path) -> None:
        (checkpoint / SINGLE).rename(checkpoint / "pytorch_model.bin")
        message = refuse_export(checkpoint)
        assert "pytorch_model.bin" in message
        assert "save_pretrained" in message

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "\xff"],
    )
    def test_a_damaged_index(self, checkpoint: Path, tensors: dict[str, Tensor], content: str) -> None:
        save(checkpoint, tensors, by_part)
        (checkpoint / INDEX).write_text(content, encoding="latin-1")
        message = refuse_export(checkpoint)
        assert f"{INDEX} is damaged" in message
        assert str(checkpoint / INDEX) in message
        assert "weight_map" in message

    def test_a_missing_shard(self, checkpoint: Path, tensors: dict[str, Tensor]) -> None:
        (save(checkpoint, tensors, by_part) / "rest.safetensors").unlink()
        message = refuse_export(checkpoint)
        assert f"{checkpoint / 'rest.safetensors'} does not exist" in message
        assert "download the checkpoint again" in message

    @pytest.mark.parametrize("sharded", [False, True])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[: len(content) // 2],
            lambda content: content[:-1],
            lambda content: content[:4],
            lambda content: b"",
            lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
            lambda content: content[:8] + b"\xff" * 40 + content[48:],
        ],
        ids=["half", "one byte short", "four bytes", "empty", "git-lfs pointer", "header overwritten"],
    )
    def test_a_file_that_is_no_whole_safetensors(
        self, checkpoint: Path, tensors: dict[str, Tensor], sharded: bool, damage: Callable[[bytes], bytes]
    ) -> None:
        file = save(checkpoint, tensors, by_part if sharded else None) / ("rest.safetensors" if sharded else SINGLE)
        file.write_bytes(damage(file.read_bytes()))
        message = refuse_export(checkpoint)
        assert "cannot be read" in message
        assert str(file) in message
        assert "a complete safetensors file" in message

    @pytest.mark.parametrize("name", [FC1, EMBEDDING, "multi_modal_projector.linear_2.bias"])
    def test_a_missing_tensor_is_named(self, checkpoint: Path, tensors: dict[str, Tensor], name: str) -> None:
        save(checkpoint, {key: tensor for key, tensor in tensors.items() if key != name})
        message = refuse_export(checkpoint)
        assert f"tensor '{name.replace('.model.', '.')}' is missing" in message
        assert str(list(tensors[name].shape)) in message

    def test_an_index_that_names_the_wrong_shard(self, checkpoint: Path, tensors: dict[str, Tensor]) -> None:
        save(checkpoint, tensors, by_part)
        index = json.loads((checkpoint / INDEX).read_text())
        index["weight_map"][FC1] = "text.safetensors"
        (checkpoint / INDEX).write_text(json.dumps(index))
        message = refuse_export(checkpoint)
        assert str(checkpoint / "text.safetensors") in message
        assert FC1 in message

    @pytest.mark.parametrize("name", [FC1, EMBEDDING])
    def test_a_wrong_shape_is_told_with_the_right_one(
        self, checkpoint: Path, tensors: dict[str, Tensor], name: str
    ) -> None:
        save(checkpoint, tensors | {name: tensors[name].T.contiguous()})
        message = refuse_export(checkpoint)
        assert f"tensor '{name.replace('.model.', '.')}' has the wrong shape" in message
        assert f"received: {list(tensors[name].T.shape)}" in message
        assert f"expected: {list(tensors[name].shape)}" in message

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", [FC1, EMBEDDING])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_values_that_are_not_finite_name_their_tensor(
        self, checkpoint: Path, tensors: dict[str, Tensor], name: str, value: float, dtype: torch.dtype
    ) -> None:
        spoilt = tensors[name].to(dtype).clone()
        spoilt[3, 5] = value
        message = refuse_export(save(checkpoint, tensors | {name: spoilt}))
        assert f"tensor '{name.replace('.model.', '.')}' holds NaN or infinity" in message
        assert f"1 of {spoilt.numel()} values" in message

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_weight_too_large_for_half_precision(
        self, checkpoint: Path, tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        large = tensors[FC1].clone()
        large[0, 0] = -98_304.0  # exact in bfloat16
        save(checkpoint, tensors | {FC1: large.to(dtype)})
        message = refuse_export(checkpoint, precision=Precision.FP16)
        assert f"tensor '{FC1}' overflows in fp16" in message
        assert "received: largest magnitude 9.83e+04" in message
        assert "expected: at most 6.55e+04" in message
        assert "export this model in fp32" in message
        build(checkpoint, Precision.FP32)

    def test_the_largest_half_precision_value_does_not_overflow(
        self, checkpoint: Path, tensors: dict[str, Tensor]
    ) -> None:
        largest = tensors[FC1].clone()
        largest[0, 0] = 65504.0
        module, _ = build(save(checkpoint, tensors | {FC1: largest}), Precision.FP16)
        assert module.state_dict()[f"encoder.{FC1}"][0, 0] == 65504.0


class TestConfig:
    def test_no_directory(self, tmp_path: Path) -> None:
        message = refuse_export(tmp_path / "missing")
        assert f"{tmp_path / 'missing'} does not exist" in message

    def test_a_file(self, checkpoint: Path) -> None:
        assert f"{checkpoint / SINGLE} is not a directory" in refuse_export(checkpoint / SINGLE)

    def test_no_config(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        message = refuse_export(checkpoint)
        assert f"{checkpoint} without config.json" in message
        assert "Hugging Face layout" in message

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "not json",
            "[]",
            "7",
            '"llava"',
            "{}",
            '{"model_type": null}',
            '{"model_type": ["llava"]}',
            "\xff\xfe",
        ],
    )
    def test_a_config_that_is_none(self, checkpoint: Path, content: str) -> None:
        (checkpoint / "config.json").write_text(content, encoding="latin-1")
        message = refuse_export(checkpoint)
        assert "config.json is not a model configuration" in message
        assert str(checkpoint / "config.json") in message
        assert '"model_type"' in message

    @pytest.mark.parametrize(
        ("model_type", "known"),
        [
            ("qwen2_vl", "Qwen2-VL:"),
            ("qwen3_vl", "DeepStack"),
            ("llavaonevision1_5", "RICE-ViT"),
            ("llava_qwen", "llava-hf"),
        ],
    )
    def test_near_architectures_are_named(self, checkpoint: Path, model_type: str, known: str) -> None:
        edit_config(checkpoint, lambda config: config.update(model_type=model_type))
        message = refuse_export(checkpoint)
        assert f"model_type {model_type!r}" in message
        assert known in message

    @pytest.mark.parametrize("model_type", ["llava_med", "llama", "clip", "", "LLaVA"])
    def test_other_architectures(self, checkpoint: Path, model_type: str) -> None:
        edit_config(checkpoint, lambda config: config.update(model_type=model_type))
        message = refuse_export(checkpoint)
        assert f"model_type {model_type!r}" in message
        assert "one of llava" in message
        assert "flashvlm models" in message

    @pytest.mark.parametrize(
        ("change", "received", "expected"),
        [
            (lambda c: c.update(vision_config={"model_type": "siglip_vision_model"}), "siglip", "clip_vision_model"),
            (lambda c: c.update(vision_feature_select_strategy="full"), "full", "default"),
            (lambda c: c.update(vision_feature_layer=[-2, -5]), "[-2, -5]", "one layer"),
            (lambda c: c.update(vision_feature_layer=[-2]), "[-2]", "one layer"),
            (lambda c: c.update(vision_feature_layer=5), "5 of 4 layers", "-4 to -1, or 1 to 4"),
            (lambda c: c.update(vision_feature_layer=-5), "-5 of 4 layers", "-4 to -1, or 1 to 4"),
            (lambda c: c.update(vision_feature_layer=0), "0 of 4 layers", "-4 to -1, or 1 to 4"),
            (lambda c: c.update(vision_feature_layer="-2"), "vision_feature_layer", "a llava model"),
            (lambda c: c.update(vision_config={"model_type": "new_tower"}), "new_tower", "a llava model"),
            (lambda c: c["vision_config"].update(hidden_size="big"), "hidden_size", "a llava model"),
            (lambda c: c["vision_config"].update(hidden_act="new_act"), "new_act", "a llava model"),
            (lambda c: c["vision_config"].update(patch_size=0), "ZeroDivisionError", "a llava model"),
            (lambda c: c["vision_config"].update(num_attention_heads=5), "attention heads", "a llava model"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_relatives_of_what_is_supported(
        self, checkpoint: Path, change: Callable[[dict[str, Any]], object], received: str, expected: str
    ) -> None:
        edit_config(checkpoint, change)
        message = refuse_export(checkpoint)
        assert received in message.partition("received: ")[2].partition("expected: ")[0]
        assert expected in message.partition("expected: ")[2]

    @pytest.mark.parametrize("layer", [-4, -3, -2, -1, 1, 4])
    def test_every_layer_of_the_encoder_can_be_the_feature_layer(self, checkpoint: Path, layer: int) -> None:
        edit_config(checkpoint, lambda config: config.update(vision_feature_layer=layer))
        module, _ = build(checkpoint)
        names = {name.split(".")[4] for name in module.state_dict() if ".encoder.layers." in name}
        assert len(names) == (layer if layer > 0 else 5 + layer)

    def test_weights_of_another_size_than_the_config(self, checkpoint: Path) -> None:
        edit_config(checkpoint, lambda config: config["vision_config"].update(image_size=84))
        message = refuse_export(checkpoint)
        assert "image processor and vision tower do not belong together" in message
        assert "images of 56 x 56" in message
        assert "84 x 84 pixels, from config.json" in message
        # 84 / 14 = 6 patches a side, and the class token.
        with pytest.raises(CheckpointError, match=re.escape("expected: [37, 32], from config.json")):
            build(checkpoint)

    def test_a_config_as_the_hub_has_it_leaves_the_defaults_out(self) -> None:
        config = {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": 32000,
            "model_type": "llava",
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "torch_dtype": "float16",
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        }
        adapter = adapter_of(config)
        assert adapter.dims == VisualDims(336, 14, 576, 1024, 4096)
        assert (adapter.image_token_id, adapter.vocab_size) == (32000, 32064)
        assert adapter.dims == adapter_of(MODELS["llava-1.5-7b"].config).dims


class TestRandomWeights:
    CONFIG = MODELS["llava-1.5-7b"].config

    def test_a_seed_is_a_checkpoint(self) -> None:
        names = {FC1: (64, 32), "language_model.embed_tokens.weight": (320, 64), "vision_tower.a.bias": (7,)}
        first, again, other = (RandomWeights(self.CONFIG, seed) for seed in (3, 3, 4))
        for name, shape in names.items():
            assert torch.equal(first.read(name, shape), again.read(name, shape))
            assert not torch.equal(first.read(name, shape), other.read(name, shape))
        assert first.fingerprint() == again.fingerprint() != other.fingerprint()
        assert (first.label, other.label) == ("random:3", "random:4")

    def test_the_order_of_reading_does_not_matter(self) -> None:
        first, again = RandomWeights(self.CONFIG, 0), RandomWeights(self.CONFIG, 0)
        ab = [first.read(name, (8, 8)) for name in ("a", "b")]
        ba = [again.read(name, (8, 8)) for name in ("b", "a")]
        assert torch.equal(ab[0], ba[1])
        assert not torch.equal(ab[0], ab[1])
        assert first.fingerprint() == again.fingerprint()

    def test_activations_keep_their_size(self) -> None:
        weights = RandomWeights(self.CONFIG, 0)
        deep = weights.read("vision_tower.encoder.layers.0.mlp.fc1.weight", (256, 1024))
        # Standard deviation of 262144 samples: within 1 % is seven standard errors.
        assert float(deep.std()) == pytest.approx(1024**-0.5, rel=0.01)
        assert torch.equal(weights.read("vision_tower.pre_layrnorm.weight", (5,)), torch.ones(5))
        assert torch.equal(weights.read("vision_tower.pre_layrnorm.bias", (5,)), torch.zeros(5))


def test_a_full_disk_while_the_embeddings_are_written(tiny_checkpoint: Path, small_disk: Path) -> None:
    """A memory-mapped write would not raise here but end the process with a bus error."""
    weights = open_checkpoint(tiny_checkpoint)
    (small_disk / "ballast").write_bytes(bytes(220_000))
    with pytest.raises(StorageError, match="the disk is full"), atomic_directory(small_disk / "bundle") as staging:
        write_text_embeddings(staging / "table.npy", adapter_of(weights.config), weights)
    assert [entry.name for entry in small_disk.iterdir()] == ["ballast"]
