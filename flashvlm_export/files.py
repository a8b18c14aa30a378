"""Writing files so that a reader never sees half of one, and hashing them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flashvlm_export.errors import BundleError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (
    errno.EACCES,
    errno.EBUSY,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

# What file systems without locks answer.
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def sha256_of_all(paths: Iterable[Path]) -> str:
    """Return one hash over the hashes of several files, in this order; raises ``OSError`` as :func:`sha256_of` does."""
    return hashlib.sha256(" ".join(map(sha256_of, paths)).encode()).hexdigest()


def sha256_of(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits; ``on_bytes`` hears of each piece read."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            on_bytes(len(chunk))
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
        # A path that cannot be written cannot be cleaned up either.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside ``path``; swap it into place on success, remove it on failure.

    A process killed in between leaves what stood at ``path`` and a ``.NAME.TOKEN.partial`` directory, which the next
    write to the same ``path`` removes. A lock that the kernel drops with the process tells the two apart: process ids
    do not, since in containers each writer has the same one. A symbolic link at ``path`` stays; its target changes.
    """
    with storage_errors(path):
        path = path.resolve()
        if path.is_mount():
            raise StorageError(
                "the output path is a mount point, which cannot be replaced as a whole",
                received=path,
                expected="a directory below it",
                hint=f"write to {path / 'bundle'}",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    try:
        with storage_errors(path):
            # Some network file systems have no locks; what is abandoned there stays.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            _swap(temporary, path)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def bundle_lock(path: Path) -> Iterator[None]:
    """Hold the right to write into the bundle at ``path``; a second writer, in this process or another, is refused.

    The lock is on the directory itself, so it leaves no file behind, the kernel drops it with the process, and it
    follows a bundle that is moved. Readers do not take it. On network file systems without locks it does nothing.

    Raises:
        BundleError: if another writer holds the lock.
        StorageError: if the directory cannot be opened or written.
    """
    with storage_errors(path):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(
                "another process is writing to this bundle",
                received=path,
                expected="one writer at a time",
                hint="wait until the other calibrate or build has ended, then run this again",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if not os.access(path, os.W_OK | os.X_OK):
            raise StorageError("the bundle cannot be written", received=path, expected="a directory you may write to")
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below ``path`` into :class:`StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                "the disk is full; nothing was changed",
                received=f"{error.strerror} while writing {path}",
                hint="free some space, or write to another disk",
            ) from error
        if error.errno in _UNWRITABLE:
            raise StorageError(
                "the output path cannot be written",
                received=f"{path}: {error.strerror}",
                expected="a path in a directory that you may write to",
            ) from error
        raise


def require_free_space(path: Path, needed_bytes: int) -> None:
    """Raise :class:`StorageError` unless the disk that holds ``path`` has ``needed_bytes`` free."""
    path = path.resolve()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
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


def _swap(new: Path, path: Path) -> None:
    retired = new.with_suffix(".retired")
    try:
        if path.exists():
            path.rename(retired)
        new.rename(path)
    finally:
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)
        elif retired.exists():
            retired.rename(path)


def _clear_abandoned(path: Path) -> None:
    """Remove what killed writers of ``path`` left; put back what one had moved aside when it was killed."""
    pattern = f".{glob.escape(path.name)}.*"
    for partial in path.parent.glob(f"{pattern}.partial"):
        if _is_abandoned(partial):
            shutil.rmtree(partial, ignore_errors=True)
    for retired in path.parent.glob(f"{pattern}.retired"):
        if retired.with_suffix(".partial").exists():
            continue  # its writer lives
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.rename(path)


def _is_abandoned(directory: Path) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)
