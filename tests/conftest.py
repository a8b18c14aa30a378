"""Fixtures of the whole suite. An export takes seconds, so one tiny bundle of each family serves all tests.

``FLASHVLM_TEST_BUNDLE`` names a bundle that was exported before, so that the runtime's tests run without torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

import flashvlm_export  # noqa: F401  # before a test imports ONNX Runtime, which then keeps its telemetry to itself


def pytest_configure() -> None:
    """Let Ctrl-C through: a shell's background job ignores it, and hands that on to what tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Shared:
    """Directories below ``root``, each made by the first process that wants it, while the others wait."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the directory ``name``, written by ``make`` unless it is there."""
        from filelock import FileLock  # torch brings it, and what is made here needs torch

        path = self._root / name
        with FileLock(self._root / f"{name}.lock"):
            if not path.exists():
                make(path)
        return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Shared:
    """Makes directories that all of pytest's processes use."""
    root = tmp_path_factory.getbasetemp()
    return Shared(root.parent if hasattr(request.config, "workerinput") else root)


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: Shared) -> Path:
    """A LLaVA checkpoint of 16 visual tokens with random weights. Do not change it: copy it."""
    pytest.importorskip("transformers", reason="making a checkpoint needs transformers")
    from helpers.tiny_llava import make_tiny_llava

    return shared.made("tiny-llava", make_tiny_llava)


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest, shared: Shared) -> Path:
    """The bundle of ``tiny_checkpoint``: graphs in fp32 and fp16, fused and split; fp32 decoder. Do not change it."""
    given = os.environ.get("FLASHVLM_TEST_BUNDLE")
    if given:
        return Path(given).absolute()
    return _exported(shared, request.getfixturevalue("tiny_checkpoint"), ["divprune", "cdpruner"])


def _exported(shared: Shared, checkpoint: Path, further_selectors: Sequence[str] = ()) -> Path:
    from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint

    def export(output: Path) -> None:
        bundle_from_checkpoint(
            ExportSettings(
                str(checkpoint),
                output,
                split=True,
                further_selectors=further_selectors,
                decoder="fp32",
                engine_check="off",
            )
        )

    return shared.made(f"{checkpoint.name}-bundle", export)


@pytest.fixture(scope="session")
def qwen_checkpoint(shared: Shared) -> Path:
    """A Qwen2.5-VL checkpoint with random weights. Do not change it: copy it."""
    from helpers.tiny_qwen import make_tiny_qwen

    return shared.made("tiny-qwen", make_tiny_qwen)


@pytest.fixture(scope="session")
def qwen_bundle(qwen_checkpoint: Path, shared: Shared) -> Path:
    """The bundle of ``qwen_checkpoint``. Do not change it."""
    return _exported(shared, qwen_checkpoint)


@pytest.fixture(scope="session")
def next_checkpoint(shared: Shared) -> Path:
    """A LLaVA-NeXT checkpoint with random weights. Do not change it: copy it."""
    from helpers.tiny_llava import make_tiny_llava

    return shared.made("tiny-next", partial(make_tiny_llava, family="llava_next"))


@pytest.fixture(scope="session")
def next_bundle(next_checkpoint: Path, shared: Shared) -> Path:
    """The bundle of ``next_checkpoint``. Do not change it."""
    return _exported(shared, next_checkpoint)


@pytest.fixture(scope="session")
def onevision_checkpoint(shared: Shared) -> Path:
    """A LLaVA-OneVision checkpoint with random weights. Do not change it: copy it."""
    from helpers.tiny_llava import make_tiny_llava

    return shared.made("tiny-onevision", partial(make_tiny_llava, family="llava_onevision"))


@pytest.fixture(scope="session")
def onevision_bundle(onevision_checkpoint: Path, shared: Shared) -> Path:
    """The bundle of ``onevision_checkpoint``. Do not change it."""
    return _exported(shared, onevision_checkpoint)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, so that a full disk is a real one; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
