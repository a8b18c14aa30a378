"""One configuration for all of the server; a file and the command line write it alike."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from flashvlm_export.errors import ConfigError, DependencyError, install_hint
from flashvlm_export.manifest import Positions, TextSpan

Count = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
S = TypeVar("S", bound="ServerSettings")


def _about(description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description)


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``flashvlm serve`` obeys. Each field is an option, with dashes, and a key of ``--config FILE``, as it is."""

    bundle: Annotated[Path, _about("directory written by flashvlm export")]
    name: Annotated[str | None, _about("what clients call the model (default: as the bundle's checkpoint)")] = None

    # What runs.
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None, _about("visual graph (default: the bundle's first)")
    ] = None
    engine: Annotated[str | None, _about("TensorRT engine that runs the visual side: its target, or auto")] = None
    cuda_graphs: Annotated[bool, _about("replay the engine's kernels as one CUDA graph for each set of sizes")] = False
    selectors: Annotated[
        tuple[str, ...] | None,
        _about(
            "run encoder and selectors apart, so that an image is encoded once; names with commas, the first is the "
            "default (default: all of a bundle exported with --split, else the fused graph)"
        ),
    ] = None
    provider: Annotated[Literal["cpu", "cuda", "tensorrt"], _about("where ONNX Runtime runs")] = "cpu"
    threads: Annotated[Count | None, _about("threads of one operator (default: one per core)")] = None
    llm: Annotated[str, _about("what answers, as of flashvlm run")] = "onnxruntime"

    # What a request gets that does not say.
    token_budget: Annotated[
        Count | Literal["full"] | None,
        _about("visual tokens to keep of an image, or full for all (default: what the graph is optimised for)"),
    ] = None
    text_span: Annotated[TextSpan, _about("text that guides selection")] = "prompt"
    positions: Annotated[
        Positions | None, _about("of kept tokens: without gaps, or where they stood (default: the family's)")
    ] = None
    answer_tokens: Annotated[Count, _about("longest answer")] = 256

    # How requests share the model.
    max_answers: Annotated[
        Count | None, _about("answers under way at once (default: 8, or 1 where the engine does not batch)")
    ] = None
    max_wait_ms: Annotated[Amount, _about("a request waits so long for others to be encoded with")] = 5.0
    max_queue: Annotated[Count, _about("requests that wait; one more is refused with 503")] = 64
    cache_mib: Annotated[Size, _about("memory for encoded images, MiB")] = 256

    # What a request may be.
    max_body_mib: Annotated[Count, _about("largest request, MiB")] = 20
    max_images: Annotated[Count, _about("images of one request, earlier turns included")] = 16
    max_megapixels: Annotated[Positive, _about("largest image, million pixels, looked at before decoding")] = 24.0
    max_prompt_tokens: Annotated[Count, _about("longest prompt, tokens of text")] = 4096
    max_answer_tokens: Annotated[Count, _about("longest answer that may be asked for")] = 1024
    max_seconds: Annotated[Positive, _about("time for one request, from its last byte to the answer's")] = 120.0
    slow_seconds: Annotated[
        Positive, _about("time for a client to send a request, and to take each part of an answer")
    ] = 20.0

    # Who may ask, and from where.
    host: Annotated[str, _about("address to listen at; anything but loopback is open to the network")] = "127.0.0.1"
    port: Annotated[Port, _about("port to listen at; 0 takes a free one")] = 8000
    hosts: Annotated[
        tuple[str, ...],
        _about("names by which clients may call the server (default: any, but only localhost's on loopback)"),
    ] = ()
    api_keys: Annotated[Path | None, _about("file with one key a line, one of which every request has to bring")] = None
    access_log: Annotated[bool, _about("log a line for each request, on standard error")] = False
    image_hosts: Annotated[
        tuple[str, ...], _about("hosts that images may be fetched from; without, pictures come inside requests only")
    ] = ()

    def __post_init__(self) -> None:
        if self.answer_tokens > self.max_answer_tokens:
            raise ValueError(f"answer_tokens {self.answer_tokens} is above max_answer_tokens {self.max_answer_tokens}")
        for name in (*self.hosts, *self.image_hosts):
            if "/" in name or (":" in name and not _is_address(name)):
                raise ValueError(f"a host is a name alone, such as example.com, not {name!r}")

    @classmethod
    def of(cls: type[S], values: Mapping[str, Any], file: Path | None = None) -> S:
        """Return the settings of ``file``, a TOML file, with ``values`` in place of its own.

        Args:
            values: by name; those of a command line may be texts, with commas where there are several.
            file: if there is one.

        Raises:
            ConfigError: if the file cannot be read, a key is unknown, or a value is of another type or out of range.
            DependencyError: on Python 3.10 without tomli, if there is a file.
        """
        from_file = _read(file) if file is not None else {}
        several = {option.name for option in cls.options() if option.kind is tuple}
        typed = {name: _split(value) if name in several else value for name, value in values.items()}
        try:
            # A command line knows only texts.
            return msgspec.convert({**from_file, **typed}, cls, strict=False, dec_hook=_path)
        except msgspec.ValidationError as error:
            if "missing required field `bundle`" in str(error):
                raise ConfigError(
                    "which bundle to serve is not said", expected='BUNDLE, or bundle = "DIR" in --config FILE'
                ) from None
            raise ConfigError(
                "the server cannot be set up so",
                received=str(error),
                expected=f"one of {', '.join(cls.__struct_fields__)}"
                if "unknown field" in str(error)
                else "what --help says of it",
            ) from None

    @classmethod
    def options(cls) -> list[Option]:
        """Return every setting but the bundle, in their order."""
        hints = get_type_hints(cls, include_extras=True)
        defaults = {field.name: field.default for field in msgspec.structs.fields(cls)}
        return [Option.of(name, hint, defaults[name]) for name, hint in hints.items() if name != "bundle"]

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        if not _is_address(self.host):
            return self.host.lower() == "localhost"
        return ipaddress.ip_address(self.host.strip("[]")).is_loopback


class Option(NamedTuple):
    """A setting as the command line has it.

    Attributes:
        kind: of the value: ``str``, ``int``, ``float``, ``bool``, or ``tuple`` for texts with commas.
        choices: the only values, if they are few.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    default: Any
    description: str

    @classmethod
    def of(cls, name: str, hint: Any, default: Any) -> Option:
        """Read an annotation such as ``Annotated[int | None, Meta(description=…)]``."""
        inner, *_, about = get_args(hint)
        if get_origin(inner) in (Union, UnionType):
            inner, *others = [each for each in get_args(inner) if each is not type(None)]
            if others:  # such as a number or a word: a text, of which msgspec makes either
                inner = str
        if get_origin(inner) is Annotated:
            inner = get_args(inner)[0]
        choices = get_args(inner) if get_origin(inner) is Literal else ()
        kind = str if choices or inner is Path else get_origin(inner) or inner
        return cls(name, kind, choices, default, about.description)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _path(kind: type, value: Any) -> Any:
    """Return what a setting that is a path says; msgspec knows no paths."""
    if not isinstance(value, (str, Path)):
        raise ValueError(f"expected a path, got {value!r}")
    return kind(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        return msgspec.toml.decode(file.read_bytes())
    except ImportError as error:
        raise DependencyError(
            "reading TOML on Python 3.10 needs tomli", received=str(error), hint=install_hint("serve")
        ) from error
    except OSError as error:
        raise ConfigError("the configuration cannot be read", received=f"{file}: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the configuration is not TOML", received=f"{file}: {error}", expected="lines such as port = 8000"
        ) from None
