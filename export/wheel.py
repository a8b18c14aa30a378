"""This package as a wheel, built from the source tree that is running."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import flashvlm_export
from flashvlm_export.errors import DependencyError, ExportError, install_hint

# Everything that goes into the wheel; a source tree holds much else, and setuptools leaves its work where it builds.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "flashvlm_export", "export", "calibration", "runtime")


def wheel_from_source(directory: Path) -> Path:
    """Build the wheel into ``directory`` and return its path.

    Raises:
        DependencyError: if this package runs from a wheel, or the package build is missing.
        ExportError: with what the build said last.
    """
    root = Path(flashvlm_export.__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise DependencyError(
            "there is no source tree to build the runtime's wheel from",
            received=f"flashvlm-export {flashvlm_export.__version__}, installed in {root}",
            hint="give a wheel with --wheel FILE; in a clone: python -m build --wheel",
        )
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        source.mkdir()
        for name in _SOURCES:
            if (root / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(root / name, source / name, symlinks=True, ignore=ignored)
            else:
                shutil.copy(root / name, source)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if "No module named build" in done.stderr:
        raise DependencyError("building the runtime's wheel needs the package build", hint=install_hint("export"))
    if done.returncode != 0:
        raise ExportError("the runtime's wheel cannot be built", received="\n    ".join(lines[-8:]))
    (wheel,) = directory.glob("*.whl")
    return wheel
