"""A module that looks like one recorded release of TensorRT and computes nothing, to hold our calls against.

What the release has not raises :class:`AttributeError`; a call that fits none of its signatures raises
:class:`TypeError`, as pybind11 would. Methods return what their signature says: an object of that class, ``True``,
zero, an empty text.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

Behaviour = Mapping[str, Any]


def recorded_module(surface: Mapping[str, Any], behaviour: Behaviour) -> Any:
    """Return the module of ``surface`` (see ``tensorrt_surface.py``).

    Args:
        surface: what the release offers.
        behaviour: ``Class.member`` → what a method does (called with the object and its arguments), or what a
            property holds at first. Only members that the release has can be named.
    """
    enums = {name: _enum(name, members) for name, members in surface["enums"].items()}
    classes: dict[str, Any] = {}
    unknown = [name for name in behaviour if name.rpartition(".")[2] not in surface["classes"][name.partition(".")[0]]]
    if unknown:
        raise AttributeError(f"TensorRT {surface['version']} has no {', '.join(unknown)}")
    known: dict[str, Any] = dict(enums)
    for name, members in surface["classes"].items():
        base = classes.get(surface["bases"].get(name), object)
        classes[name] = known[name] = _class(name, base, members, behaviour, known)
    classes["ILogger"].Severity = enums.pop("ILogger.Severity")
    return SimpleNamespace(__version__=surface["version"], **enums, **classes)


def _enum(name: str, members: Mapping[str, int]) -> Any:
    kind: Any = enum.Enum(name, dict(members))
    kind.__int__ = lambda self: self.value
    return kind


def _class(name: str, base: type, members: Mapping[str, Any], behaviour: Behaviour, known: Mapping[str, Any]) -> Any:
    def forbid(self: Any, attribute: str, value: Any) -> None:
        # A subclass of the user's may hold what it likes.
        if type(self).__name__ == name and not isinstance(getattr(type(self), attribute, None), property):
            raise AttributeError(f"{name} has no attribute {attribute}")
        object.__setattr__(self, attribute, value)

    body: dict[str, Any] = {"__setattr__": forbid}
    for member, description in members.items():
        given = behaviour.get(f"{name}.{member}")
        if isinstance(description, list):
            body[member] = _method(name, member, description, given, known)
        elif description in ("property", "read-only"):
            body[member] = _property(member, given, writable=description == "property")
        else:
            enumeration, _, value = description.rpartition(".")
            body[member] = known[enumeration][value]
    return type(name, (base,), body)


def _property(name: str, first: Any, *, writable: bool) -> property:
    def get(self: Any) -> Any:
        return self.__dict__.get(name, first)

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put if writable else None)


def _method(
    owner: str, name: str, signatures: list[str], behave: Callable[..., Any] | None, known: Mapping[str, Any]
) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        for signature in signatures:
            parameters, returns = _parse(signature)
            if _fits(parameters[1:], args, kwargs, known):
                if behave is not None:
                    return behave(self, *args, **kwargs)
                return _default(returns, known)
        raise TypeError(f"{owner}.{name} takes {' or '.join(signatures)}; received {args} {kwargs}")

    method.__name__ = name
    return method


def _parse(signature: str) -> tuple[list[tuple[str, str, bool]], str]:
    """Return name, type and whether there is a default, of each parameter; and what is returned."""
    inside, _, returns = signature.rpartition(") -> ")
    parameters = []
    # Commas inside of brackets belong to a type or a default.
    for part in re.split(r", (?![^\[<(]*[\]>)])", inside[1:]):
        name, _, rest = part.partition(": ")
        kind, equals, _ = rest.partition(" = ")
        parameters.append((name, kind, bool(equals)))
    return parameters, returns


def _fits(
    parameters: list[tuple[str, str, bool]], args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Mapping[str, Any]
) -> bool:
    if len(args) > len(parameters) or not set(kwargs) <= {name for name, _, _ in parameters[len(args) :]}:
        return False
    given = dict(zip((name for name, _, _ in parameters), args, strict=False)) | dict(kwargs)
    return all(
        _accepts(kind, given[name], known) if name in given else has_default for name, kind, has_default in parameters
    )


def _accepts(kind: str, value: Any, known: Mapping[str, Any]) -> bool:
    if kind in known:
        return isinstance(value, known[kind]) or (value is None and not issubclass(known[kind], enum.Enum))
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "typing.SupportsInt"):
        return isinstance(value, int)
    if kind == "str":
        return isinstance(value, str)
    if kind.endswith(("buffer", "Buffer")):
        return isinstance(value, (bytes, bytearray, memoryview))
    if kind in ("tuple", "list"):
        return type(value).__name__ == kind
    if kind == "Dims" or kind.startswith(("List[", "collections.abc.Sequence[")):
        return isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
    raise NotImplementedError(f"a parameter of type {kind}")


def _default(returns: str, known: Mapping[str, Any]) -> Any:
    if returns in known:
        kind = known[returns]
        return kind.__new__(kind)
    return {"bool": True, "int": 0, "str": ""}.get(returns)
