"""Tokenizer, chat template and image processor of a checkpoint, in the form the runtime reads without transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from flashvlm_export.bundle import CHAT_TEMPLATE, TOKENIZER
from flashvlm_export.errors import CheckpointError
from flashvlm_export.export.checkpoint import WeightSource
from flashvlm_export.manifest import PromptSettings
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.preprocessor import PreprocessorSettings
from flashvlm_export.progress import Progress

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def write_prompt_files(directory: Path, target: Path, adapter: Adapter, progress: Progress) -> PromptSettings | None:
    """Write ``tokenizer.json`` and ``chat_template.jinja`` to ``target``; return what the manifest says of them.

    A checkpoint without a tokenizer gives a bundle whose graph runs but that takes no questions; a note says so.

    Raises:
        CheckpointError: if there is a tokenizer that cannot be used.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        progress.note(f"NOTE: {directory} has no tokenizer; the bundle will take tensors but no questions")
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        content = tokenizer.backend_tokenizer.to_str(pretty=True)
    except Exception as error:  # the tokenizers library raises a bare Exception, transformers much else
        raise CheckpointError(
            "the tokenizer cannot be read",
            received=f"{directory}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected=f"one of {', '.join(_TOKENIZER_FILES)} that transformers' AutoTokenizer reads as a fast tokenizer",
        ) from error
    (target / TOKENIZER).write_text(content, encoding="utf-8")
    image_token = tokenizer.convert_ids_to_tokens(adapter.image_token_id)
    # An ordinary token may also come from what a person types, so it cannot mark the place of an image.
    if adapter.image_token_id not in tokenizer.added_tokens_decoder:
        raise CheckpointError(
            "the tokenizer has no token for the image placeholder",
            received=f"id {adapter.image_token_id} is {image_token!r}",
            expected="the added token that image_token_index in config.json names",
            hint="tokenizer and config.json do not belong together; download the checkpoint again",
        )
    template = _chat_template(directory, tokenizer)
    if template is None:
        progress.note(f"NOTE: {directory} has no chat template; using the one of {adapter.family}")
        template = adapter.default_chat_template
    (target / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    takes_videos = adapter.video_token_id in tokenizer.added_tokens_decoder
    return PromptSettings(
        image_token=image_token,
        image_token_id=adapter.image_token_id,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        eos_token_ids=_eos_token_ids(directory, adapter, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        video_token=tokenizer.convert_ids_to_tokens(adapter.video_token_id) if takes_videos else "",
        video_token_id=adapter.video_token_id if takes_videos else None,
    )


def read_preprocessor(adapter: Adapter, weights: WeightSource, progress: Progress) -> PreprocessorSettings:
    """Return the checkpoint's image processor settings; with random weights, those that such a checkpoint has.

    Where images keep their own resolution, the most pixels are cut down to the most visual tokens that the adapter has;
    a note says so.

    Raises:
        CheckpointError: if there are none, or they give images that the vision tower does not take.
        ConfigError: if the runtime cannot reproduce them exactly.
    """
    found = adapter.default_processor if weights.directory is None else _image_processor_config(weights.directory)
    return _fitting(adapter, adapter.default_processor, found, "images", progress)


def read_video_preprocessor(adapter: Adapter, weights: WeightSource, progress: Progress) -> PreprocessorSettings:
    """Return the same for the frames of a video: of the checkpoint's video processor, or else of that for images.

    Raises:
        CheckpointError, ConfigError: likewise.
    """
    usual = adapter.default_video_processor
    found = usual
    if weights.directory is not None:
        found = _processor_config(weights.directory, "video_processor") or _image_processor_config(weights.directory)
    # A video processor names itself, has the steps of that for images, and a size of its own.
    own = {key: value for key, value in usual.items() if key in ("image_processor_type", "image_grid_pinpoints")}
    return _fitting(adapter, usual, {"size": usual["size"], **found, **own}, "frames", progress).of_one_picture


def _fitting(
    adapter: Adapter, usual_config: dict[str, Any], found: dict[str, Any], what: str, progress: Progress
) -> PreprocessorSettings:
    """Return the settings ``found`` for the tower, which ``usual_config`` fits."""
    usual, settings = PreprocessorSettings.from_hf(usual_config), PreprocessorSettings.from_hf(found)
    have, want = (_what_the_tower_sees(each) for each in (settings, usual))
    if have != want:
        raise CheckpointError(
            "image processor and vision tower do not belong together",
            received=have,
            expected=f"{want}, from config.json",
        )
    if settings.pixel_range is None:
        return settings
    multiple, least, most = settings.pixel_range
    tokens = adapter.dims.num_patches
    if most > tokens * multiple**2:
        progress.note(
            f"NOTE: {what} of more than {tokens} visual tokens are scaled down to these, as many as TensorRT sorts; "
            f"the checkpoint's own processor goes up to {most // multiple**2}"
        )
    most = min(most, tokens * multiple**2)
    return replace(settings, pixel_range=(multiple, min(least, most), most))


def _what_the_tower_sees(settings: PreprocessorSettings) -> str:
    if settings.pixel_range is not None:
        return f"images of multiples of {settings.pixel_range[0]} pixels"
    height, width = settings.output_size
    tiles = f" in tiles of the resolutions {settings.resolutions}" if settings.resolutions else ""
    return f"images of {height} x {width} pixels{tiles}"


def _processor_config(directory: Path, kind: str) -> dict[str, Any]:
    """Return a processor's configuration from either of the files that transformers has kept it in; empty if none."""
    combined = _read_json(directory / "processor_config.json").get(kind)
    alone = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}[kind]
    return combined if isinstance(combined, dict) else _read_json(directory / alone)


def _image_processor_config(directory: Path) -> dict[str, Any]:
    config = _processor_config(directory, "image_processor")
    if not config:
        raise CheckpointError(
            "the checkpoint has no image processor",
            received=str(directory),
            expected="preprocessor_config.json, or processor_config.json with image_processor",
            hint="save it with transformers: AutoImageProcessor.from_pretrained(REPO).save_pretrained(DIR)",
        )
    return config


def _chat_template(directory: Path, tokenizer: Any) -> str | None:
    """Return the template the tokenizer carries, or the one a processor keeps in a file of its own."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        template = _read_json(directory / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def _eos_token_ids(directory: Path, adapter: Adapter, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: of the generation configuration, which transformers derives where it lacks."""
    ids = _read_json(directory / "generation_config.json").get("eos_token_id")
    if ids is None:
        ids = GenerationConfig.from_model_config(adapter.config).eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    listed = [ids] if isinstance(ids, int) else ids
    if not isinstance(listed, list) or not listed or not all(type(token) is int for token in listed):
        raise CheckpointError(
            "nothing says which token ends an answer",
            received=f"eos_token_id {ids!r} in {directory}",
            expected="a token id, or a list of them, in generation_config.json or config.json",
        )
    return listed


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read",
            received=f"{path}: {error}",
            expected="a JSON object",
            hint="download the checkpoint again",
        ) from error
    return content if isinstance(content, dict) else {}
