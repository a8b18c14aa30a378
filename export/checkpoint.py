"""Reading weights lazily: only the tensors asked for, one at a time, straight from memory-mapped shards."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashvlm_export.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightSource(ABC):
    """Where tensors come from, under canonical names.

    Attributes:
        config: content of ``config.json``.
        directory: where tokenizer and preprocessor files lie, or ``None``.
        label: for the manifest: ``checkpoint`` or ``random:SEED``.
    """

    config: Mapping[str, Any]
    directory: Path | None
    label: str

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the canonical names of all tensors, as far as they are known before reading."""

    @abstractmethod
    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return one tensor in its stored dtype; a missing one raises :class:`CheckpointError`."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return one tensor in its stored dtype, checked for shape and for NaN and infinity.

        Raises:
            CheckpointError: if it is missing, has another shape, or is not finite.
        """
        tensor = self._read(name, shape)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"tensor '{name}' has the wrong shape",
                received=list(tensor.shape),
                expected=f"{list(shape)}, from config.json",
                hint="config.json and weights do not belong together; download the checkpoint again",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"tensor '{name}' holds NaN or infinity",
                received=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are not finite",
                hint="the checkpoint is damaged or its training diverged; download it again",
            )
        if name not in self._digests:
            header = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
            data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
            self._digests[name] = hashlib.sha256(header + hashlib.sha256(data.data).digest()).hexdigest()
        return tensor

    def fingerprint(self) -> str:
        """Return one SHA-256 over every tensor read so far."""
        return hashlib.sha256("".join(self._digests[name] for name in sorted(self._digests)).encode()).hexdigest()


class Checkpoint(WeightSource):
    """A directory in Hugging Face layout: ``config.json`` and one or several safetensors shards."""

    label = "checkpoint"

    def __init__(self, directory: Path, canonical: Callable[[str], str]) -> None:
        super().__init__()
        self.directory: Path = directory
        self.config = read_config(directory)
        self._places = {canonical(key): (shard, key) for key, shard in weight_index(directory).items()}

    def names(self) -> Iterable[str]:
        """Return the canonical names of all tensors in the index."""
        return self._places.keys()

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._places:
            raise CheckpointError(
                f"tensor '{name}' is missing",
                received=f"{len(self._places)} tensors in {self.directory}",
                expected=f"'{name}' of shape {list(shape)}, under a name that transformers has used for it",
                hint="download the checkpoint again, or check that its model_type is right",
            )
        shard, key = self._places[name]
        path = self.directory / shard
        if not path.is_file():
            raise CheckpointError(
                "a weight shard is missing",
                received=f"{path} does not exist",
                expected=f"the shard that holds '{key}', as {INDEX} says",
                hint="download the checkpoint again",
            )
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "a weight shard cannot be read",
                received=f"{path}: {error}",
                expected="a complete safetensors file",
                hint="download the checkpoint again",
            ) from error


class RandomWeights(WeightSource):
    """Seeded random weights for a config, for sizing and latency: the same name and seed give the same tensor."""

    directory = None

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        self.config = config
        self.label = f"random:{seed}"

    def names(self) -> Iterable[str]:
        """Return nothing: any tensor can be had."""
        return ()

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        seed = int.from_bytes(hashlib.sha256(f"{self.label} {name}".encode()).digest()[:8], "little") >> 1
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 and "embed" not in name else 1
        scale = 0.02 if len(shape) == 1 or "embed" in name else fan_in**-0.5
        return torch.empty(shape).normal_(0.0, scale, generator=torch.Generator().manual_seed(seed))


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json`` of a checkpoint directory."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            "there is no checkpoint in this directory",
            received=f"{directory} {_lacks_config(directory)}",
            expected="a directory in Hugging Face layout: config.json, *.safetensors, tokenizer.json, …",
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["model_type"], str):
            raise TypeError(f"model_type is {config['model_type']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "config.json is not a model configuration",
            received=f"{path}: {error!r}",
            expected='a JSON object with "model_type"',
        ) from error
    return config


def _lacks_config(directory: Path) -> str:
    if directory.is_dir():
        return "without config.json"
    return "is not a directory" if directory.exists() else "does not exist"


def weight_index(directory: Path) -> dict[str, str]:
    """Return ``{tensor name: shard file}``; raise :class:`CheckpointError` if there are no weights to be read."""
    # As transformers does: an index may be left over from an earlier save in shards.
    if (directory / SINGLE).is_file():
        try:
            with safe_open(directory / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "the weights cannot be read",
                received=f"{directory / SINGLE}: {error}",
                expected="a complete safetensors file",
                hint="download the checkpoint again",
            ) from error
    if (directory / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
            if not all(isinstance(shard, str) for shard in weight_map.values()):
                raise TypeError("weight_map names shards that are not text")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{INDEX} is damaged",
                received=f"{directory / INDEX}: {error!r}",
                expected='a JSON object with "weight_map": {tensor: file}',
                hint="download the checkpoint again",
            ) from error
        return weight_map
    pickled = sorted(file.name for file in directory.glob("*.bin"))
    raise CheckpointError(
        "the checkpoint has no safetensors weights",
        received=f"{directory}: {', '.join(pickled) or 'no weight files'}",
        expected=f"{SINGLE}, or {INDEX} with its shards",
        hint="save it again with transformers: model.save_pretrained(DIR)" if pickled else "download it again",
    )
