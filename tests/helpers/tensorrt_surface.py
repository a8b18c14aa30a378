"""What a release of TensorRT's Python bindings offers: classes, members, signatures, values of enumerations.

``python tests/helpers/tensorrt_surface.py WHEEL... --output tests/data/tensorrt`` records wheels of the bindings
(``tensorrt_cu12_bindings``, ``tensorrt_cu13_bindings``, for the Python that runs this). The bindings describe
themselves; the libraries behind them are not needed, nor a GPU: a C compiler makes empty ones to load them with.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# What the builder and the sessions touch.
CLASSES = (
    "Builder",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IRuntimeConfig",
    "IStreamWriter",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "Refitter",
    "Runtime",
)
ENUMS = (
    "BuilderFlag",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DataType",
    "HardwareCompatibilityLevel",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
)
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
_SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def describe(trt: Any) -> dict[str, Any]:
    """Return version, ``enums`` (name → member → value), ``classes`` (name → member → description) and their ``bases``.

    The description of a method is its list of signatures, of a property ``"property"`` or ``"read-only"``, and of a
    constant the enumeration that it belongs to, with its name.
    """
    enums = {name: getattr(trt, name) for name in ENUMS if hasattr(trt, name)}
    enums["ILogger.Severity"] = trt.ILogger.Severity
    return {
        "version": trt.__version__,
        "enums": {
            name: {member: int(value) for member, value in enum.__members__.items()} for name, enum in enums.items()
        },
        "classes": {name: _members(getattr(trt, name)) for name in CLASSES if hasattr(trt, name)},
        "bases": {
            name: base.__name__
            for name in CLASSES
            for base in getattr(trt, name, object).__mro__[1:2]
            if base.__name__ in CLASSES
        },
    }


def _members(kind: Any) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name in ["__init__", *dir(kind)]:
        value = inspect.getattr_static(kind, name)
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, property):
            members[name] = "property" if value.fset else "read-only"
        elif hasattr(type(value), "__members__"):
            members[name] = f"{type(value).__qualname__}.{value.name}"
        elif not isinstance(value, type):
            signatures = _signatures(getattr(kind, name))
            if signatures:
                members[name] = signatures
    return members


def _signatures(method: Any) -> list[str]:
    """Return the signatures that pybind11 wrote into the docstring, without the names of modules."""
    lines = (method.__doc__ or "").splitlines()
    name = re.escape(method.__name__)
    found = [match[1] for line in lines if (match := re.match(rf"(?:\d+\. )?{name}(\(.*\) -> .*)", line))]
    return [re.sub(r"\w+_bindings\.\w+\.", "", signature) for signature in found]


def describe_wheel(wheel: Path) -> dict[str, Any]:
    """Return what the bindings in ``wheel`` offer, loaded in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        (bindings,) = Path(directory).glob("*/tensorrt.so")
        needed = re.findall(rf"lib(?:{'|'.join(_LIBRARIES)})\.so\.\d+", bindings.read_bytes().decode("latin-1"))
        stub = Path(directory, "stub.c")
        stub.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _SYMBOLS))
        for library in set(needed):
            file = Path(directory, library)
            subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", file, stub], check=True)
        done = subprocess.run(
            [sys.executable, __file__, "--module", bindings.parent.name],
            env={**os.environ, "LD_LIBRARY_PATH": directory, "PYTHONPATH": directory},
            stdout=subprocess.PIPE,
            check=True,
        )
        surface: dict[str, Any] = json.loads(done.stdout)
        return surface


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what wheels of TensorRT's bindings offer.")
    parser.add_argument("wheel", type=Path, nargs="*")
    parser.add_argument("--output", type=Path, help="directory for one file per version")
    parser.add_argument("--module", help="print this installed module instead")
    args = parser.parse_args()
    if args.module:
        print(json.dumps(describe(importlib.import_module(args.module))))
        return
    for wheel in args.wheel:
        surface = describe_wheel(wheel)
        (args.output / f"{surface['version']}.json").write_text(json.dumps(surface, indent=1) + "\n")


if __name__ == "__main__":
    main()
