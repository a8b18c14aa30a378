"""Where a report was measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

from flashvlm_export.gpu import gpu_at_hand
from flashvlm_export.memory import physical_bytes
from flashvlm_export.report.records import Environment

_PACKAGES = (
    "flashvlm-export",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "pillow",
    "tensorrt",
    "tensorrt_rtx_cu12",
    "torch",
    "transformers",
)


def describe_environment() -> Environment:
    """Return this machine, and the versions of what is installed of the packages that matter here."""
    gpu = gpu_at_hand()
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not every backend is everywhere
            versions[name] = importlib.metadata.version(name)
    return Environment(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=physical_bytes(),
        gpu=None if gpu is None else gpu.name,
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions=versions,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
