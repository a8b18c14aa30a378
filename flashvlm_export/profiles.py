"""Optimisation profiles: the ranges of batch, text length and budget that an engine is built for."""

from __future__ import annotations

from collections.abc import Sequence

from flashvlm_export.errors import ConfigError
from flashvlm_export.specs import DynamicDim, GraphSpec

Profile = tuple[DynamicDim, ...]


def resolve_profiles(spec: GraphSpec, texts: Sequence[str]) -> list[Profile]:
    """Return one profile per text such as ``batch=1:1:4,text=1:64:256``, or the graph's own if there are none.

    What a text leaves out is as the graph declares it; one number stands for minimum, optimum and maximum.

    Raises:
        ConfigError: unknown dimension, not three numbers, minimum above optimum or optimum above maximum, or a budget
            above the graph's visual tokens.
    """
    return [_resolve(spec, text) for text in texts] or [spec.dims]


def format_profile(profile: Profile) -> str:
    """Return the text that :func:`resolve_profiles` reads."""
    return ",".join(f"{dim.name}={dim.min}:{dim.opt}:{dim.max}" for dim in profile)


def _resolve(spec: GraphSpec, text: str) -> Profile:
    dims = {dim.name: dim for dim in spec.dims}
    given = set()
    for part in text.split(","):
        name, equals, values = part.strip().partition("=")
        if not equals or name not in dims or name in given:
            raise ConfigError(
                "not a profile",
                received=repr(part) + (" (twice)" if name in given else ""),
                expected=f"NAME=MIN:OPT:MAX, separated by commas, with NAME of {', '.join(dims)}, each at most once",
            )
        given.add(name)
        dims[name] = _range(name, values)
    most = spec.dim("budget").max
    if dims["budget"].max > most:
        raise ConfigError(
            "a profile cannot keep more visual tokens than there are",
            received=f"budget={dims['budget'].max}",
            expected=f"at most {most}",
        )
    return tuple(dims.values())


def _range(name: str, text: str) -> DynamicDim:
    try:
        numbers = [int(value) for value in text.split(":")]
        low, best, high = numbers * 3 if len(numbers) == 1 else numbers
        return DynamicDim(name, low, best, high)
    except ValueError:
        raise ConfigError(
            "not a range",
            received=f"{name}={text}",
            expected=f"{name}=MIN:OPT:MAX, whole numbers with 1 <= MIN <= OPT <= MAX, or one number",
        ) from None
