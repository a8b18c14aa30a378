"""An array in the format of ``torch.save``, without torch: what vLLM's server takes prompt embeddings in.

A zip archive of the raw values and of a pickle that rebuilds the tensor from them (PyTorch's notes on serialization,
format version 3).
"""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np

from flashvlm_export.specs import Array

_FALSE, _END = b"\x89", b"."


def torch_bytes(array: Array) -> bytes:
    """Return ``array``, of any shape, as ``torch.save`` would write a float32 tensor on the CPU."""
    values = np.ascontiguousarray(array, "<f4")
    strides = [stride // values.itemsize for stride in values.strides]
    storage = _tuple(_text("storage"), _name("torch", "FloatStorage"), _text("0"), _text("cpu"), _int(values.size))
    hooks = _call(_name("collections", "OrderedDict"), _tuple())
    tensor = _tuple(
        storage + b"Q",  # the persistent id of the values
        _int(0),
        _tuple(*map(_int, values.shape)),
        _tuple(*map(_int, strides)),
        _FALSE,
        hooks,
    )
    program = b"\x80\x02" + _call(_name("torch._utils", "_rebuild_tensor_v2"), tensor) + _END
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, not compressed, as torch demands
        for name, content in (
            ("data.pkl", program),
            ("byteorder", b"little"),
            ("data/0", values.tobytes()),
            ("version", b"3\n"),
        ):
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode("ascii")


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _call(function: bytes, arguments: bytes) -> bytes:
    return function + arguments + b"R"
