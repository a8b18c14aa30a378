"""The selectors this package knows, and the NumPy entry point that runs any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flashvlm_export.errors import ConfigError
from flashvlm_export.selection.config import (
    CDPrunerConfig,
    ClsAttentionConfig,
    DivPruneConfig,
    FlashVLMConfig,
    RandomConfig,
    SoftFlashVLMConfig,
    UniformConfig,
    VisionZipConfig,
    VisPrunerConfig,
)
from flashvlm_export.specs import Array, check_budget

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Selector:
    """One registry row.

    Attributes:
        name: what users type after ``--selector``.
        summary: one line for ``--help``.
        config_type: frozen dataclass of settings; defaults are the method's own. What parity between precisions is
            judged on are its ``is_stable`` (bool) and ``important_tokens(budget)`` (int): see :class:`FlashVLMConfig`.
        needs_saliency: whether the encoder has to compute an attention row for it.
        needs_fixed_grid: whether every image has to have the same grid of visual tokens, as images in tiles have not.
        numpy_function: ``module:function`` of the readable definition (see :func:`select_tokens`).
        torch_module: ``module:Class`` of an ``nn.Module`` built from the config, with
            ``forward(patch_features [B,N,C], saliency [B,N] or None, visual_tokens [B,N,D], text_embeds [B,L,D],
            text_mask [B,L], budget int64 scalar) -> (kept bool [B,N], scores float32 [B,N])``. Exactly ``budget``
            tokens of each row are marked as kept.
    """

    name: str
    summary: str
    config_type: type
    needs_saliency: bool
    numpy_function: str
    torch_module: str
    needs_fixed_grid: bool = False

    def make_config(self, settings: Mapping[str, Any]) -> Any:
        """Return the config for ``settings``; values may be text, as from a command line.

        Raises:
            ConfigError: if a name is unknown, or a value has the wrong type or is out of range.
        """
        known = [field.name for field in fields(self.config_type)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(
                f"selector '{self.name}' has no such setting",
                received=unknown,
                expected=known or "none: nothing is set",
            )
        try:
            return msgspec.convert(dict(settings), self.config_type, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"a setting of selector '{self.name}' has the wrong type", received=str(error), expected="its type"
            ) from error

    def make_module(self, config: Any) -> nn.Module:
        """Return the torch module that exports (imports torch)."""
        module: nn.Module = _load(self.torch_module)(config)
        return module.eval()


_PACKAGE = "flashvlm_export.selection"

SELECTORS: dict[str, Selector] = {
    row.name: row
    for row in (
        Selector(
            name="flashvlm",
            summary="saliency × text relevance for half of the budget, diversity for the rest (arXiv 2512.20561)",
            config_type=FlashVLMConfig,
            needs_saliency=True,
            numpy_function=f"{_PACKAGE}.flashvlm_numpy:select_image",
            torch_module=f"{_PACKAGE}.flashvlm_torch:FlashVLM",
        ),
        Selector(
            name="flashvlm-soft",
            summary="FlashVLM with relevance sharpened less, and background by distance",
            config_type=SoftFlashVLMConfig,
            needs_saliency=True,
            numpy_function=f"{_PACKAGE}.flashvlm_numpy:select_image",
            torch_module=f"{_PACKAGE}.flashvlm_torch:FlashVLM",
        ),
        Selector(
            name="vispruner",
            summary="attention of CLS for half of the budget, duplicates removed from the rest (arXiv 2412.01818)",
            config_type=VisPrunerConfig,
            needs_saliency=True,
            numpy_function=f"{_PACKAGE}.vispruner_numpy:select_image",
            torch_module=f"{_PACKAGE}.vispruner_torch:VisPruner",
        ),
        Selector(
            name="visionzip",
            summary="attention of CLS, and even steps through the rest, without merging (arXiv 2412.04467)",
            config_type=VisionZipConfig,
            needs_saliency=True,
            numpy_function=f"{_PACKAGE}.visionzip_numpy:select_image",
            torch_module=f"{_PACKAGE}.visionzip_torch:VisionZip",
        ),
        Selector(
            name="divprune",
            summary="greatest smallest distance between kept tokens (arXiv 2503.02175)",
            config_type=DivPruneConfig,
            needs_saliency=False,
            numpy_function=f"{_PACKAGE}.divprune_numpy:select_image",
            torch_module=f"{_PACKAGE}.divprune_torch:DivPrune",
        ),
        Selector(
            name="cdpruner",
            summary="mode of a determinantal point process, given the text (arXiv 2506.10967)",
            config_type=CDPrunerConfig,
            needs_saliency=False,
            numpy_function=f"{_PACKAGE}.cdpruner_numpy:select_image",
            torch_module=f"{_PACKAGE}.cdpruner_torch:CDPruner",
        ),
        Selector(
            name="cls-attention",
            summary="what CLS attends to most",
            config_type=ClsAttentionConfig,
            needs_saliency=True,
            numpy_function=f"{_PACKAGE}.baselines_numpy:cls_attention",
            torch_module=f"{_PACKAGE}.baselines_torch:ClsAttention",
        ),
        Selector(
            name="uniform",
            summary="an even grid of patches",
            config_type=UniformConfig,
            needs_saliency=False,
            numpy_function=f"{_PACKAGE}.baselines_numpy:uniform_grid",
            torch_module=f"{_PACKAGE}.baselines_torch:UniformGrid",
            needs_fixed_grid=True,
        ),
        Selector(
            name="random",
            summary="the same random patches of every image",
            config_type=RandomConfig,
            needs_saliency=False,
            numpy_function=f"{_PACKAGE}.baselines_numpy:random_tokens",
            torch_module=f"{_PACKAGE}.baselines_torch:Random",
            needs_fixed_grid=True,
        ),
    )
}


def get_selector(name: str) -> Selector:
    """Return the registry row called ``name``; raise :class:`ConfigError` if there is none."""
    try:
        return SELECTORS[name]
    except KeyError:
        raise ConfigError("unknown selector", received=repr(name), expected=f"one of {', '.join(SELECTORS)}") from None


def select_tokens(
    patch_features: Array,
    saliency: Array,
    visual_tokens: Array,
    text_embeds: Array,
    text_mask: Array,
    budget: int,
    config: Any = None,
) -> Array:
    """Return the indices of the visual tokens to keep, in NumPy and without torch.

    The readable definition in float64, and the oracle that torch modules and exported graphs are tested against.

    Args:
        patch_features: ``[B, N, C]``, encoder output, CLS removed.
        saliency: ``[B, N]``, attention of CLS to each patch, mean over heads.
        visual_tokens: ``[B, N, D]``, projector output.
        text_embeds: ``[B, L, D]``, rows of the LLM's embedding table; padded rows are ignored. ``L`` may be 0.
        text_mask: bool ``[B, L]``, true = a real token.
        budget: tokens to keep per image, ``1..N``.
        config: settings of any registered selector; default ``FlashVLMConfig()``.

    Returns:
        int64 ``[B, budget]``, ascending in each row.

    Raises:
        BudgetError: if ``budget`` is not a whole number in ``1..N``.
        ConfigError: if the arrays do not fit together or ``config`` belongs to no selector.
    """
    config = FlashVLMConfig() if config is None else config
    selector = next((row for row in SELECTORS.values() if type(config) is row.config_type), None)
    if selector is None:
        raise ConfigError(
            "no selector has settings of this type",
            received=type(config).__name__,
            expected=f"one of {', '.join(row.config_type.__name__ for row in SELECTORS.values())}",
        )
    arrays = {
        "patch_features": (patch_features, ("B", "N", "C")),
        "saliency": (saliency, ("B", "N")),
        "visual_tokens": (visual_tokens, ("B", "N", "D")),
        "text_embeds": (text_embeds, ("B", "L", "D")),
        "text_mask": (text_mask, ("B", "L")),
    }
    sizes: dict[str, int] = {}
    for name, (array, letters) in arrays.items():
        if array.ndim != len(letters) or any(
            sizes.setdefault(letter, size) != size for letter, size in zip(letters, array.shape, strict=True)
        ):
            raise ConfigError(
                f"'{name}' does not fit the other arrays",
                received=list(array.shape),
                expected=f"[{', '.join(letters)}] with {sizes}",
            )
    if text_mask.dtype != np.bool_:
        raise ConfigError("'text_mask' has the wrong dtype", received=text_mask.dtype, expected="bool")
    count = check_budget(budget, sizes["N"])
    select_image: Callable[..., Array] = _load(selector.numpy_function)
    rows = [
        select_image(
            patch_features[b].astype(np.float64),
            saliency[b].astype(np.float64),
            visual_tokens[b].astype(np.float64),
            text_embeds[b][text_mask[b]].astype(np.float64),
            count,
            config,
        )
        for b in range(sizes["B"])
    ]
    return np.stack(rows).astype(np.int64) if rows else np.empty((0, count), np.int64)


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
