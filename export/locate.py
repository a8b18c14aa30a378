"""Finding a checkpoint: a directory, the local Hugging Face cache, the hub, or random weights."""

from __future__ import annotations

import re
from pathlib import Path

import flashvlm_export
from flashvlm_export.errors import CheckpointError, ConfigError
from flashvlm_export.export.checkpoint import Checkpoint, RandomWeights, WeightSource, read_config, weight_index
from flashvlm_export.models import MODELS, ModelEntry, adapter_class, find_model

# Everything an export reads, and nothing else (no pickled weights).
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_HUB_TIMEOUT_S = 20.0
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_weights(model: str, weights: str, *, revision: str | None = None) -> WeightSource:
    """Return the weights that ``--weights`` names for ``model``.

    Args:
        model: registry name, hub id, or checkpoint directory; a label where ``weights`` is a directory.
        weights: ``auto`` (the local Hugging Face cache, then the hub; a model of this repository from there),
            ``random`` or ``random:SEED``, or a directory.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: if the weights cannot be had, saying what to do.
    """
    entry = find_model(model)
    if weights == "random" or weights.startswith("random:"):
        if entry is None:
            raise ConfigError(
                "random weights need a registered model",
                received=model,
                expected=f"one of {', '.join(MODELS)}",
            )
        seed = weights.partition(":")[2] or "0"
        if not seed.isdecimal():
            raise ConfigError("the seed is not a whole number", received=weights, expected="random or random:SEED")
        return RandomWeights(entry.config, int(seed))
    if weights != "auto":
        directory = Path(weights)
    elif model and Path(model).is_dir():
        directory = Path(model)
    elif entry is not None and entry.repo.startswith("./"):
        directory = _in_repository(entry)
    elif entry is not None or _HUB_ID.fullmatch(model):
        directory, revision = _snapshot(entry.repo if entry else model, revision), None
    elif "/" in model:
        directory = Path(model)
    else:
        raise ConfigError(
            "unknown model",
            received=repr(model),
            expected=f"one of {', '.join(MODELS)}, a hub id such as org/name, or a checkpoint directory",
            hint="flashvlm models lists the names; --weights DIR reads a checkpoint from disk",
        )
    if revision is not None:
        raise ConfigError("a revision belongs to the hub", received=f"--revision {revision} with {directory}")
    return Checkpoint(directory, adapter_class(read_config(directory)["model_type"]).canonical)


def _in_repository(entry: ModelEntry) -> Path:
    """Return the folder of a checkpoint that this repository carries; an installed wheel does not have it."""
    directory = Path(flashvlm_export.__file__).parents[1] / entry.repo
    if not directory.is_dir():
        raise CheckpointError(
            f"the weights of {entry.name} are not installed",
            received=f"no directory {directory}",
            expected="a clone of the repository, where they lie",
            hint=f"clone it and run there, or name them: --weights CLONE/{entry.repo.removeprefix('./')}",
        )
    return directory


def _snapshot(repo: str, revision: str | None) -> Path:
    """Return the cached snapshot of ``repo``, downloading it where the hub can be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        cached = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=_FILES))
        # Only the config, as a tokenizer download leaves it, or some of the shards, as a broken download does, is no
        # snapshot.
        if all((cached / shard).is_file() for shard in weight_index(cached).values()):
            return cached
    except (OSError, ValueError, CheckpointError):
        pass  # not cached, not whole, or no name of a repository: the hub has the last word, and says why
    try:
        # snapshot_download itself waits for ever where a firewall swallows what it sends.
        HfApi().model_info(repo, revision=revision, timeout=_HUB_TIMEOUT_S)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # network, proxy, permission, disk: one message for whatever is in the way
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"the weights of {repo} cannot be had",
            received=f"not whole in the local Hugging Face cache, and the hub did not give them: "
            f"{type(error).__name__}: {reason}",
            expected="a checkpoint directory, a cached snapshot, or a reachable hub",
            hint=f"on a machine with access: hf download {repo} --local-dir DIR; then --weights DIR here. "
            "For sizing and latency without weights: --weights random",
        ) from error
