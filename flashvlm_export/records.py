"""JSON records of a bundle: indented for people, decoded strictly, refused where a newer version wrote them."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from flashvlm_export.errors import BundleError

T = TypeVar("T")


def encode_record(record: object) -> bytes:
    """Return ``record``, a dataclass, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode_record(content: bytes, kind: type[T], *, newest: int, what: str, mend: str) -> T:
    """Return the record in ``content``, which has a ``schema_version``.

    Args:
        content: JSON.
        kind: dataclass to decode to; a missing field or a wrong type names its place.
        newest: largest version that this package reads.
        what: names the record in messages.
        mend: how to get a good one.

    Raises:
        BundleError: if it is no such record, or a newer one.
    """
    try:
        version = msgspec.json.decode(content, type=_Version).schema_version
        if version > newest:
            raise BundleError(
                f"{what} was written by a newer flashvlm-export",
                received=f"schema version {version}",
                expected=f"at most {newest}",
                hint="upgrade this package: pip install --upgrade flashvlm-export",
            )
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{what} is damaged", received=str(error), hint=mend) from error


class _Version(msgspec.Struct):
    schema_version: int
