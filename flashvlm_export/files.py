"""Writing files so that a reader never sees half of one, and hashing them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flashvlm_export.errors import StorageError


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place on success, remove it on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with storage_errors(path):
            yield temporary
            _sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside ``path``; swap it into place on success, remove it on failure.

    A process killed in between leaves what stood at ``path`` and a ``.NAME.PID.partial`` directory, which the next
    write to the same ``path`` removes once that process is gone.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        temporary.mkdir()
    try:
        with storage_errors(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            retired = path.with_name(f".{path.name}.{os.getpid()}.retired")
            if path.exists():
                path.rename(retired)
            try:
                temporary.rename(path)
            except OSError:
                if retired.exists():
                    retired.rename(path)
                raise
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below ``path`` into :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                "the disk is full; nothing was changed",
                received=f"{error.strerror} while writing {path}",
                hint="free some space, or write to another disk",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StorageError(
                "the output path cannot be written",
                received=f"{path}: {error.strerror}",
                expected="a path in a directory that you may write to",
            ) from error
        raise


def require_free_space(path: Path, needed_bytes: int) -> None:
    """Raise :class:`StorageError` unless the disk that holds ``path`` has ``needed_bytes`` free."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise StorageError(
            "not enough disk space",
            received=f"{free / 1e9:.2f} GB free at {existing}",
            expected=f"about {needed_bytes / 1e9:.2f} GB",
            hint="free some space, or write to another disk",
        )


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _remove_abandoned(path: Path) -> None:
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
