"""What engines are built for: a table of devices, with the facts that decide who can build for whom.

Sources: NVIDIA's CUDA GPU compute capability table, the JetPack release notes (TensorRT and Python of each), and the
list of architectures that TensorRT-RTX compiles for ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashvlm_export.errors import ConfigError

Capability = tuple[int, int]


@dataclass(frozen=True)
class JetPack:
    """Software that a Jetson brings along: versions of the release, TensorRT, Python, CUDA and the C library."""

    version: str
    tensorrt: str
    python: str
    cuda: str
    glibc: str


@dataclass(frozen=True)
class Target:
    """One kind of device.

    Attributes:
        name: as ``--target`` takes it.
        devices: what it covers.
        compute_capabilities: of its GPUs; an engine for the target holds code for each.
        machine: processor of the host: ``x86_64`` or ``aarch64``.
        memory_gb: of the smallest device that the name covers; on a Jetson the processor shares it. 0 where unknown.
        jetpack: for Jetsons, the release that the engine is meant for.
    """

    name: str
    devices: str
    compute_capabilities: tuple[Capability, ...]
    machine: str
    memory_gb: int = 0
    jetpack: JetPack | None = None

    @property
    def capabilities(self) -> str:
        """The compute capabilities as text: ``8.6, 8.9``."""
        return ", ".join(map(format_capability, self.compute_capabilities))


_JETPACK_6 = JetPack("6.2", "10.3", "3.10", "12.6", "2.35")
_JETPACK_7 = JetPack("7.1", "10.13", "3.12", "13.0", "2.39")

# What TensorRT-RTX 1.7 compiles for ahead of time, on a machine without such a GPU.
RTX_CAPABILITIES: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))

# Where no GPU is at hand and none is named: one engine for every RTX GPU since 2020.
PORTABLE = "rtx"

_TARGETS = (
    Target("rtx", "GeForce and workstation RTX 30, 40 and 50", ((8, 6), (8, 9), (12, 0)), "x86_64", 8),
    Target("rtx-30", "RTX 30, RTX A2000 to A6000, A10, A40", ((8, 6),), "x86_64", 8),
    Target("rtx-40", "RTX 40, RTX Ada", ((8, 9),), "x86_64", 8),
    Target("rtx-50", "RTX 50, RTX PRO Blackwell", ((12, 0),), "x86_64", 8),
    Target("a100", "A100", ((8, 0),), "x86_64", 40),
    Target("l4", "L4", ((8, 9),), "x86_64", 24),
    Target("l40s", "L40S", ((8, 9),), "x86_64", 48),
    Target("h100", "H100", ((9, 0),), "x86_64", 80),
    Target("h200", "H200", ((9, 0),), "x86_64", 141),
    Target("orin-agx", "Jetson AGX Orin", ((8, 7),), "aarch64", 32, _JETPACK_6),
    Target("orin-nx", "Jetson Orin NX", ((8, 7),), "aarch64", 8, _JETPACK_6),
    Target("orin-nano", "Jetson Orin Nano", ((8, 7),), "aarch64", 4, _JETPACK_6),
    Target("thor", "Jetson AGX Thor", ((11, 0),), "aarch64", 128, _JETPACK_7),
    Target("dgx-spark", "DGX Spark (GB10)", ((12, 1),), "aarch64", 128),
)
TARGETS = {target.name: target for target in _TARGETS}


def find_target(name: str) -> Target:
    """Return the target called ``name``; raise :class:`ConfigError` if the table has none."""
    if name not in TARGETS:
        raise ConfigError("unknown target", received=repr(name), expected=f"one of {', '.join(TARGETS)}")
    return TARGETS[name]


def format_capability(capability: Capability) -> str:
    """Return ``8.7`` for ``(8, 7)``."""
    return "{}.{}".format(*capability)
