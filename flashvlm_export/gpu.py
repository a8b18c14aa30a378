"""The GPU at hand, asked of the CUDA driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashvlm_export.targets import Capability


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver gives it.
        capability: compute capability.
        memory_bytes: all of its memory.
    """

    name: str
    capability: Capability
    memory_bytes: int


def gpu_at_hand() -> Gpu | None:
    """Return the first GPU, or ``None`` where there is no driver, no GPU, or no cuda-python to ask with."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    try:
        _call(driver.cuInit(0))
        device = _call(driver.cuDeviceGet(0))
    except (RuntimeError, OSError):
        return None
    attribute = driver.CUdevice_attribute
    return Gpu(
        name=_call(driver.cuDeviceGetName(64, device)).split(b"\0")[0].decode(),
        capability=(
            _call(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)),
            _call(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)),
        ),
        memory_bytes=_call(driver.cuDeviceTotalMem(device)),
    )


def _call(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA driver: {error}")
    return values[0] if values else None
