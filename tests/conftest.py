"""Fixtures of the whole suite. An export takes seconds, so one tiny checkpoint and one tiny bundle serve all tests.

``FLASHVLM_TEST_BUNDLE`` names a bundle that was exported before, so that the runtime's tests run without torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashvlm_export  # noqa: F401  # before a test imports ONNX Runtime, which then keeps its telemetry to itself


def pytest_configure() -> None:
    """Let Ctrl-C through: a shell's background job ignores it, and hands that on to what tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA checkpoint of 16 visual tokens with random weights. Do not change it: copy it."""
    pytest.importorskip("transformers", reason="making a checkpoint needs transformers")
    from helpers.tiny_llava import make_tiny_llava

    return make_tiny_llava(tmp_path_factory.mktemp("checkpoint") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of ``tiny_checkpoint``: graphs in fp32 and fp16, fused and split; fp32 decoder. Do not change it."""
    given = os.environ.get("FLASHVLM_TEST_BUNDLE")
    if given:
        return Path(given).absolute()
    checkpoint = request.getfixturevalue("tiny_checkpoint")
    from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint

    output = tmp_path_factory.mktemp("bundle") / "tiny"
    further = ["divprune", "cdpruner"]
    settings = ExportSettings(
        str(checkpoint), output, split=True, further_selectors=further, decoder="fp32", engine_check="off"
    )
    return bundle_from_checkpoint(settings).path


def _export_split(checkpoint: Path) -> Path:
    from flashvlm_export.export.bundle_from_checkpoint import ExportSettings, bundle_from_checkpoint

    settings = ExportSettings(
        str(checkpoint), checkpoint.parent / "bundle", split=True, decoder="fp32", engine_check="off"
    )
    return bundle_from_checkpoint(settings).path


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL checkpoint with random weights. Do not change it: copy it."""
    from helpers.tiny_qwen import make_tiny_qwen

    return make_tiny_qwen(tmp_path_factory.mktemp("qwen") / "tiny")


@pytest.fixture(scope="session")
def qwen_bundle(qwen_checkpoint: Path) -> Path:
    """The bundle of ``qwen_checkpoint``. Do not change it."""
    return _export_split(qwen_checkpoint)


@pytest.fixture(scope="session")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT checkpoint with random weights. Do not change it: copy it."""
    from helpers.tiny_llava import make_tiny_llava

    return make_tiny_llava(tmp_path_factory.mktemp("next") / "tiny", family="llava_next")


@pytest.fixture(scope="session")
def next_bundle(next_checkpoint: Path) -> Path:
    """The bundle of ``next_checkpoint``. Do not change it."""
    return _export_split(next_checkpoint)


@pytest.fixture(scope="session")
def onevision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-OneVision checkpoint with random weights. Do not change it: copy it."""
    from helpers.tiny_llava import make_tiny_llava

    return make_tiny_llava(tmp_path_factory.mktemp("onevision") / "tiny", family="llava_onevision")


@pytest.fixture(scope="session")
def onevision_bundle(onevision_checkpoint: Path) -> Path:
    """The bundle of ``onevision_checkpoint``. Do not change it."""
    return _export_split(onevision_checkpoint)


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
