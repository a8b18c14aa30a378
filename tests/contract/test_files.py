"""Writing: whatever happens in the middle, a reader finds the old content, whole, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashvlm_export.errors import BundleError, StorageError
from flashvlm_export.files import atomic_directory, atomic_write, bundle_lock, require_free_space, sha256_of

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def write(path: Path, text: str) -> None:
    with atomic_directory(path) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text(text)


def write_half(target: contextlib.AbstractContextManager[Path], error: BaseException) -> None:
    with target as temporary:
        (temporary / "file" if temporary.is_dir() else temporary).write_text("half")
        raise error


def fill(file: Path) -> None:
    with file.open("wb") as stream:
        for _ in range(1000):
            stream.write(bytes(4096))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    write(tmp_path / "bundle", "old")
    return tmp_path / "bundle"


@contextlib.contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has got as far as printing ``ready``."""
    prelude = "import os, sys, time, signal\nfrom pathlib import Path\nfrom flashvlm_export.files import *\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout is not None
        try:
            assert running.stdout.readline() == "ready\n", running.stderr and running.stderr.read()
            yield running
        finally:
            running.kill()


HALF_WRITTEN = """
    with atomic_directory(Path(sys.argv[1])) as staging:
        (staging / "file").write_text("half")
        print("ready", flush=True)
        sys.stdin.readline()
        (staging / "other").write_text("whole")
"""


def test_sha256_of_a_file_larger_than_one_read(tmp_path: Path) -> None:
    data = os.urandom((4 << 20) + 1)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


class TestAtomicWrite:
    def test_writes_and_replaces(self, tmp_path: Path) -> None:
        for text in ("first", "second"):
            with atomic_write(tmp_path / "file") as temporary:
                temporary.write_text(text)
                if text == "second":
                    assert (tmp_path / "file").read_text() == "first"
        assert content(tmp_path) == {"file": "second"}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StorageError])
    def test_an_exception_inside_keeps_the_old_content(self, tmp_path: Path, error: type[BaseException]) -> None:
        (tmp_path / "file").write_text("old")
        with pytest.raises(error):
            write_half(atomic_write(tmp_path / "file"), error("in the middle"))
        assert content(tmp_path) == {"file": "old"}

    @pytest.mark.parametrize("place", ["missing/file", "file/file", "directory", "n" * 300])
    def test_a_path_that_cannot_be_written(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_text("old")
        (tmp_path / "directory").mkdir()
        with (
            pytest.raises(StorageError, match="cannot be written") as caught,
            atomic_write(tmp_path / place) as temporary,
        ):
            temporary.write_text("new")
        assert str(tmp_path / place) in str(caught.value)
        assert content(tmp_path) == {"file": "old"}
        assert names(tmp_path) == ["directory", "file"]


class TestAtomicDirectory:
    def test_writes_and_replaces_as_a_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "er" / "bundle"
        write(path, "old")
        with atomic_directory(path) as staging:
            assert names(staging) == []
            (staging / "file").write_text("new")
            assert content(path) == {"sub/file": "old"}
        assert content(path) == {"file": "new"}
        assert names(path.parent) == ["bundle"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StorageError, GeneratorExit])
    def test_an_exception_inside_keeps_the_old_content(self, old: Path, error: type[BaseException]) -> None:
        with pytest.raises(error):
            write_half(atomic_directory(old), error("in the middle"))
        assert content(old) == {"sub/file": "old"}
        assert names(old.parent) == ["bundle"]

    def test_an_exception_inside_leaves_no_new_path(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError):
            write_half(atomic_directory(tmp_path / "bundle"), RuntimeError())
        assert names(tmp_path) == []

    @pytest.mark.parametrize("failing", [1, 2])
    @pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"])
    def test_a_failed_rename_keeps_the_old_content(
        self, old: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
    ) -> None:
        renames: list[Path] = []
        rename = Path.rename

        def failing_rename(self: Path, target: Path) -> Path:
            renames.append(self)
            if len(renames) == failing:
                raise error
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing_rename)
        with pytest.raises(type(error)):
            write(old, "new")
        assert len(renames) >= failing
        assert content(old) == {"sub/file": "old"}
        assert names(old.parent) == ["bundle"]

    def test_the_working_directory_can_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        write(Path(), "new")
        assert content(tmp_path / "here") == {"sub/file": "new"}
        assert names(tmp_path) == ["here"]

    @pytest.mark.parametrize("target", ["elsewhere/real", "elsewhere/not-yet"])
    def test_a_symbolic_link_stays_and_its_target_changes(self, tmp_path: Path, target: str) -> None:
        write(tmp_path / "elsewhere" / "real", "old")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / target)
        write(link, "new")
        assert link.is_symlink()
        assert content(tmp_path / target) == {"sub/file": "new"}
        assert names(tmp_path) == ["elsewhere", "link"]
        assert not [name for name in names(tmp_path / "elsewhere") if name.startswith(".")]

    @pytest.mark.parametrize("name", ["my bundle", "b[0-9]*", ".hidden", "bündel", "-rf", "a.partial"])
    def test_unusual_names(self, tmp_path: Path, name: str) -> None:
        with process(HALF_WRITTEN, tmp_path / name) as killed:
            killed.kill()
            killed.wait()
        for text in ("old", "new"):
            write(tmp_path / name, text)
        assert content(tmp_path / name) == {"sub/file": "new"}
        assert names(tmp_path) == [name]

    def test_permissions_are_those_of_an_ordinary_directory(self, old: Path) -> None:
        (old.parent / "ordinary").mkdir()
        assert old.stat().st_mode == (old.parent / "ordinary").stat().st_mode


class TestKilled:
    def test_in_the_middle_leaves_the_old_directory_and_the_next_write_cleans_up(self, old: Path) -> None:
        with process(HALF_WRITTEN, old) as killed:
            killed.send_signal(signal.SIGKILL)
            assert killed.wait() == -signal.SIGKILL
        assert content(old) == {"sub/file": "old"}
        (partial,) = (name for name in names(old.parent) if name != "bundle")
        assert partial.endswith(".partial")
        write(old, "new")
        assert content(old) == {"sub/file": "new"}
        assert names(old.parent) == ["bundle"]

    def test_a_leftover_with_the_id_of_a_living_process_is_removed_too(self, old: Path) -> None:
        """In a container every run has the same process id, so the id of a dead one tells nothing."""
        (old.parent / f".bundle.{os.getpid()}.partial").mkdir()
        write(old, "new")
        assert names(old.parent) == ["bundle"]

    def test_between_the_two_renames_the_next_write_finds_the_old_directory(self, old: Path) -> None:
        code = """
            rename = Path.rename
            def rename_once(self, target):
                rename(self, target)
                print("ready", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            Path.rename = rename_once
            with atomic_directory(Path(sys.argv[1])) as staging:
                (staging / "file").write_text("new")
        """
        with process(code, old) as killed:
            assert killed.wait() == -signal.SIGKILL
        assert not old.exists()
        with pytest.raises(RuntimeError), atomic_directory(old):
            raise RuntimeError
        assert content(old) == {"sub/file": "old"}
        assert names(old.parent) == ["bundle"]

    def test_while_removing_the_old_directory_the_new_one_stays(self, old: Path) -> None:
        code = """
            import shutil
            def rmtree(path, **_):
                print("ready", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            shutil.rmtree = rmtree
            with atomic_directory(Path(sys.argv[1])) as staging:
                (staging / "file").write_text("new")
        """
        with process(code, old) as killed:
            assert killed.wait() == -signal.SIGKILL
        assert content(old) == {"file": "new"}
        with pytest.raises(RuntimeError), atomic_directory(old):
            raise RuntimeError
        assert content(old) == {"file": "new"}
        assert names(old.parent) == ["bundle"]

    def test_a_writer_that_lives_is_left_alone(self, old: Path) -> None:
        with process(HALF_WRITTEN, old) as living:
            write(old, "new")
            assert content(old) == {"sub/file": "new"}
            assert len(names(old.parent)) == 2
            living.communicate("go on\n")
            assert living.returncode == 0
        assert content(old) == {"file": "half", "other": "whole"}
        assert names(old.parent) == ["bundle"]


class TestFullDisk:
    @pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG"])
    def test_the_error_says_so(self, old: Path, code: str) -> None:
        number = getattr(errno, code)
        with (
            pytest.raises(StorageError, match="the disk is full; nothing was changed") as caught,
            atomic_directory(old),
        ):
            raise OSError(number, os.strerror(number))
        assert os.strerror(number) in str(caught.value)
        assert str(old) in str(caught.value)
        assert caught.value.hint
        assert content(old) == {"sub/file": "old"}
        assert names(old.parent) == ["bundle"]

    def test_a_limit_of_the_process(self, old: Path) -> None:
        """RLIMIT_FSIZE is what batch systems set; the kernel answers as on a full disk."""
        code = """
            import resource
            from flashvlm_export.errors import StorageError
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            print("ready", flush=True)
            try:
                with atomic_directory(Path(sys.argv[1])) as staging:
                    (staging / "large").write_bytes(bytes(100_001))
            except StorageError as error:
                print(error)
        """
        with process(code, old) as limited:
            output, errors = limited.communicate()
        assert "the disk is full" in output, errors
        assert content(old) == {"sub/file": "old"}
        assert names(old.parent) == ["bundle"]

    def test_a_small_disk(self, small_disk: Path) -> None:
        write(small_disk / "bundle", "old")
        with pytest.raises(StorageError, match="the disk is full"), atomic_directory(small_disk / "bundle") as staging:
            fill(staging / "large")
        assert content(small_disk / "bundle") == {"sub/file": "old"}
        assert names(small_disk) == ["bundle"]


class TestUnwritable:
    @pytest.mark.parametrize("place", ["file/bundle", "n" * 300, "n" * 250])
    def test_an_impossible_path_is_refused_before_the_work(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="cannot be written"), atomic_directory(tmp_path / place):
            pytest.fail("the work began")
        assert names(tmp_path) == ["file"]

    @pytest.mark.parametrize("place", ["/proc/bundle", "/proc/self/bundle", "/sys/bundle"])
    def test_a_file_system_that_takes_no_files(self, place: str) -> None:
        with pytest.raises(StorageError, match="cannot be written") as caught, atomic_directory(Path(place)):
            pytest.fail("the work began")
        assert place.rpartition("/")[2] in str(caught.value)

    def test_a_directory_of_someone_else(self, old: Path) -> None:
        try:
            old.parent.chmod(0o555)
            if os.getuid() == 0:
                os.seteuid(NOBODY)
            with pytest.raises(StorageError, match="cannot be written"), atomic_directory(old):
                pytest.fail("the work began")
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            old.parent.chmod(0o755)
        assert content(old) == {"sub/file": "old"}

    def test_a_mount_point_cannot_be_replaced(self) -> None:
        with pytest.raises(StorageError, match="mount point") as caught, atomic_directory(Path("/proc")):
            pytest.fail("the work began")
        assert "/proc/bundle" in str(caught.value)

    def test_a_file_at_the_path_is_replaced_only_after_the_work(self, tmp_path: Path) -> None:
        (tmp_path / "bundle").write_text("old")
        with pytest.raises(RuntimeError), atomic_directory(tmp_path / "bundle"):
            raise RuntimeError
        assert (tmp_path / "bundle").read_text() == "old"


def expect_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="another process is writing") as caught, bundle_lock(bundle):
        pytest.fail("the second writer began")
    assert str(bundle) in str(caught.value)


class TestBundleLock:
    HOLDER = """
        with bundle_lock(Path(sys.argv[1])):
            print("ready", flush=True)
            sys.stdin.readline()
    """

    def test_a_second_writer_of_the_same_process_is_refused(self, old: Path) -> None:
        with bundle_lock(old):
            expect_refused(old)
        with bundle_lock(old):
            assert content(old) == {"sub/file": "old"}

    def test_another_process_is_refused_until_the_first_is_killed(self, old: Path) -> None:
        with process(self.HOLDER, old) as holder:
            expect_refused(old)
            holder.kill()
            holder.wait()
            with bundle_lock(old):
                pass
        assert content(old) == {"sub/file": "old"}

    def test_an_exception_inside_frees_the_lock(self, old: Path) -> None:
        with pytest.raises(RuntimeError), bundle_lock(old):
            raise RuntimeError
        with bundle_lock(old):
            pass

    def test_two_bundles_do_not_share_a_lock(self, old: Path, tmp_path: Path) -> None:
        write(tmp_path / "other", "other")
        with bundle_lock(old), bundle_lock(tmp_path / "other"):
            expect_refused(old)

    @pytest.mark.parametrize("place", ["missing", "bundle/sub/file"])
    def test_a_path_that_is_no_directory(self, old: Path, place: str) -> None:
        with pytest.raises(StorageError, match="cannot be written"), bundle_lock(old.parent / place):
            pytest.fail("the work began")

    def test_a_directory_that_cannot_be_written_is_told_before_the_work(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(StorageError, match="cannot be written"), bundle_lock(old):
            pytest.fail("the work began")


class TestFreeSpace:
    def test_enough_is_enough(self, tmp_path: Path) -> None:
        require_free_space(tmp_path / "not" / "yet" / "there", 1)

    @pytest.mark.parametrize("place", ["", "not/yet/there", "link/bundle"])
    def test_too_little_is_told_in_gigabytes(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "link").symlink_to("elsewhere")
        with pytest.raises(StorageError, match="not enough disk space") as caught:
            require_free_space(tmp_path / place, 10**21)
        assert "about 1000000000000.00 GB" in str(caught.value)
        assert "GB free at" in str(caught.value)

    def test_the_disk_behind_a_link_is_asked(self, tmp_path: Path, small_disk: Path) -> None:
        (tmp_path / "bundle").symlink_to(small_disk / "bundle")
        with pytest.raises(StorageError, match="not enough disk space") as caught:
            require_free_space(tmp_path / "bundle", 10_000_000)
        assert str(small_disk) in str(caught.value)

    def test_a_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        require_free_space(Path("bundle"), 1)
        with pytest.raises(StorageError, match="not enough"):
            require_free_space(Path("bundle"), 10**21)
