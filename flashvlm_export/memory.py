"""Memory of this machine, in bytes."""

from __future__ import annotations

import os
from pathlib import Path


def physical_bytes() -> int:
    """Return what is built in."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Return what Linux estimates that programs can still take without swapping."""
    entries = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(entries["MemAvailable"].split()[0]) * 1024
