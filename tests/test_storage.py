"""Tests of atomic files and folders, and of locks, which are exclusive until their process ends."""

import errno
import fcntl
import hashlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from clip_exp import storage
from clip_exp.storage import InUse, atomic_file, atomic_folder, lock, remove_folder, remove_leftovers
from tests.conftest import REPOSITORY

FULL = OSError(28, "No space left on device")


def contents(folder: Path) -> dict[str, str | None]:
    """Return all paths in a folder with the text of files."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def fail_in(writing: AbstractContextManager[Path], error: BaseException) -> None:
    """Write half of a file or of a folder, and fail with `error`."""

    def write_half() -> None:
        with writing as temporary:
            (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_file_keeps_its_old_content_after_a_failed_write(tmp_path: Path, durable: bool, error: BaseException) -> None:
    target = tmp_path / "a.json"
    fail_in(atomic_file(target, durable=durable), error)
    assert contents(tmp_path) == {}
    with atomic_file(target, durable=durable) as temporary:
        temporary.write_text("old")
    fail_in(atomic_file(target, durable=durable), error)
    assert contents(tmp_path) == {"a.json": "old"}
    with atomic_file(target, durable=durable) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert contents(tmp_path) == {"a.json": "new"}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_folder_is_unchanged_after_a_failed_write(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "step-000001"
    fail_in(atomic_folder(target), error)
    assert contents(tmp_path) == {}
    with atomic_folder(target) as temporary:
        (temporary / "weights").write_text("old")
        (temporary / "state").write_text("old")
    fail_in(atomic_folder(target), error)
    assert contents(tmp_path) == {"step-000001": None, "step-000001/state": "old", "step-000001/weights": "old"}
    with atomic_folder(target) as temporary:
        (temporary / "weights").write_text("new")
        assert (target / "weights").read_text() == "old"
    assert contents(tmp_path) == {"step-000001": None, "step-000001/weights": "new"}


def test_a_failed_sync_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()

    def full(path: Path) -> None:
        raise FULL

    monkeypatch.setattr(storage, "sync", full)
    for context in (atomic_file(tmp_path / "file"), atomic_folder(tmp_path / "folder")):
        with pytest.raises(OSError, match="No space left"), context as temporary:
            (temporary / "new" if temporary.is_dir() else temporary).write_text("new")
    assert contents(tmp_path) == {"file": "old", "folder": None}


def test_everything_has_reached_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        storage, "sync", lambda path: synced.append("" if path == tmp_path else path.name.split("-")[-2])
    )
    monkeypatch.setattr(Path, "rename", noted(Path.rename, synced))
    monkeypatch.setattr(Path, "replace", noted(Path.replace, synced))
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert synced == ["file", "renamed", ""]
    synced.clear()
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "below").mkdir()
        for name in ("a-file-x", "below/b-file-x"):
            (temporary / name).write_text("x")
        (temporary / "below").rename(temporary / "c-below-x")
    assert sorted(synced[1:-2]) == ["below", "file", "file", "folder"]
    assert synced[-2:] == ["renamed", ""]
    synced.clear()
    with atomic_file(tmp_path / "file", durable=False), atomic_folder(tmp_path / "folder", durable=False):
        pass
    assert set(synced) == {"renamed"}


def noted(rename: Callable[..., Path], notes: list[str]) -> Callable[..., Path]:
    def renamed(path: Path, target: Path) -> Path:
        notes.append("renamed")
        return rename(path, target)

    return renamed


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], indirect=True)
def test_permissions_are_those_of_new_files(tmp_path: Path, umask: int) -> None:
    """safetensors writes files for their owner alone."""
    with atomic_file(tmp_path / "w.safetensors") as temporary:
        save_file({}, temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "below").mkdir()
        save_file({}, temporary / "w.safetensors")
        save_file({}, temporary / "below" / "w.safetensors")
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_a_folder_that_may_not_be_replaced_is_retained(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "data", replace=False) as temporary:
            (temporary / "table").write_text(content)
    assert contents(tmp_path) == {"data": None, "data/table": "first"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError), atomic_folder(tmp_path / "file", replace=False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


def test_a_folder_is_restored_when_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_folder(tmp_path / "data") as temporary:
        (temporary / "table").write_text("old")
    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if target.name == "data" and not path.name.endswith(storage.REPLACED):
            raise FULL
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "data") as temporary:
        (temporary / "table").write_text("new")
    assert contents(tmp_path) == {"data": None, "data/table": "old"}


KILL = """
import os, sys
from pathlib import Path
from clip_exp import storage
target = Path(sys.argv[1])
storage.shutil.rmtree = lambda *of, **options: os.kill(os.getpid(), 9)  # at the first removal
with storage.atomic_file(target / "file") as file, storage.atomic_folder(target / "folder") as folder:
    (folder / "table").write_text("new")
"""


def test_only_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "table").write_text("old")
    assert run(KILL, tmp_path).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(storage.TEMPORARY)]
    assert len(left) == 2
    assert sum(name.endswith(storage.REPLACED) for name in left) == 1
    others = [".writing-folder-x-0123", ".writing-x-folder-0123", ".writing-folder", "folder-0123", ".writing-fil-0123"]
    for name in others:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "folder")
    remove_leftovers(tmp_path / "file")
    remove_leftovers(tmp_path / "gone" / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["folder", *others])
    assert (tmp_path / "folder" / "table").read_text() == "new"


def test_leftovers_of_a_name_with_glob_characters_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".writing-[a]*-0123").touch()
    (tmp_path / ".writing-ab-0123").touch()
    remove_leftovers(tmp_path / "[a]*")
    assert [path.name for path in tmp_path.iterdir()] == [".writing-ab-0123"]


def test_a_folder_is_removed_by_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "rmtree", lambda path, ignore_errors: None)  # killed here
        remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    remove_leftovers(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    def write(content: str) -> None:
        for _ in range(20):
            with atomic_file(tmp_path / "file", durable=False) as temporary:
                temporary.write_text(content * 10_000)

    threads = [threading.Thread(target=write, args=(content,)) for content in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            text = (tmp_path / "file").read_text()
            assert text == text[:1] * 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


HOLD = """
import sys
from pathlib import Path
from clip_exp.storage import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
HOLD_AND_FORK = """
import os, signal, sys, time
from pathlib import Path
from clip_exp.storage import lock
with lock(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        signal.pause()
    sys.stdin.read()
"""


def run(script: str, argument: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(argument)], cwd=REPOSITORY, check=False, text=True, timeout=60
    )


@contextmanager
def process(script: str, argument: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a script in a process until it is killed or continued, and yield it with its first line."""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(argument)],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        try:
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


def refused(path: Path, **options: float) -> str:
    """Return the holder of a lock."""
    with pytest.raises(InUse) as caught, lock(path, **options):  # type: ignore[arg-type]
        pass
    return caught.value.owner


@pytest.mark.parametrize("end", ["kill", "end"])
def test_a_lock_is_exclusive_until_its_process_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / ".lock"
    with process(HOLD, path) as (holder, _):
        for wait_s in (0.0, 0.1):
            owner = refused(path, wait_s=wait_s)
            assert owner.startswith(f"process {holder.pid} on ")
        if end == "kill":
            holder.kill()
        else:
            holder.stdin.close()  # type: ignore[union-attr]
        holder.wait(60)
        with lock(path):
            assert refused(path).startswith(f"process {os.getpid()} on ")


def test_a_killed_process_frees_its_lock_while_its_forks_live(tmp_path: Path) -> None:
    """Data loading workers are forks, and may outlive the process that holds the lock of the run folder by seconds."""
    path = tmp_path / ".lock"
    with process(HOLD_AND_FORK, path) as (holder, fork):
        try:
            assert refused(path).startswith(f"process {holder.pid} on ")
            holder.kill()
            holder.wait(60)
            with lock(path):
                os.kill(int(fork), 0)  # it lives
        finally:
            os.kill(int(fork), signal.SIGKILL)


def test_a_long_wait_is_reported_and_gets_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "REPORT_AFTER_S", 0.1)
    with process(HOLD, tmp_path / ".lock") as (holder, _):
        reports: list[int] = []

        def report() -> None:
            reports.append(holder.pid)
            holder.kill()

        for wait_s in (60, math.inf):
            with lock(tmp_path / ".lock", wait_s=wait_s, on_wait=report):
                assert reports == [holder.pid]
        assert refused_in_a_thread(tmp_path / ".lock", wait_s=0.2, on_wait=lambda: reports.append(0))
        assert reports == [holder.pid, 0]


def refused_in_a_thread(path: Path, **options: object) -> bool:
    found: list[InUse] = []

    def try_it() -> None:
        try:
            with lock(path, **options):  # type: ignore[arg-type]
                pass
        except InUse as error:
            found.append(error)

    with lock(path):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    return bool(found)


def test_a_lock_file_is_removed_if_requested_and_is_still_exclusive(tmp_path: Path) -> None:
    path, inside, most, turns = tmp_path / ".lock", [], [], []

    def work() -> None:
        for _ in range(20):
            with lock(path, wait_s=math.inf, remove=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                turns.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (max(most), len(turns)) == (1, 80)
    assert list(tmp_path.iterdir()) == []
    with lock(path):
        pass
    assert path.exists()


def test_a_lock_makes_no_folder_and_its_body_may_fail(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), lock(tmp_path / "gone" / ".lock"):
        pass
    assert not (tmp_path / "gone").exists()
    with pytest.raises(KeyError), lock(tmp_path / ".lock"):
        raise KeyError
    with lock(tmp_path / ".lock"):
        pass


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK", "EINVAL"])
@pytest.mark.parametrize("remove", [False, True])
def test_without_locks_in_the_file_system_the_body_runs_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, remove: bool
) -> None:
    refuse_locks(monkeypatch, getattr(errno, name))
    with caplog.at_level(logging.WARNING):
        for wait_s in (0.0, math.inf):
            with (
                lock(tmp_path / ".a.lock", wait_s=wait_s, remove=remove) as held,
                lock(tmp_path / ".b.lock", wait_s=wait_s, remove=remove) as also_held,
            ):
                assert (held, also_held) == (False, False)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{tmp_path} is on a file system without locks (")
    assert os.strerror(getattr(errno, name)) in caplog.messages[0]
    assert [path.name for path in tmp_path.iterdir() if remove] == []
    monkeypatch.undo()
    with lock(tmp_path / ".a.lock") as held:
        assert held


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EACCES", "EWOULDBLOCK"])
def test_only_errors_of_unsupported_locks_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)
    refuse_locks(monkeypatch, number)
    # Some file systems report a lock that is held as EACCES.
    expected = InUse if name in ("EACCES", "EWOULDBLOCK") else OSError
    with pytest.raises(expected), lock(tmp_path / ".lock"):
        raise AssertionError("went on")


def test_a_lock_file_that_cannot_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error number may be reported for invalid names and for unsupported locks."""

    def refuse(path: object, *arguments: object, **options: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError), lock(tmp_path / ".lock"):
        raise AssertionError("went on")


def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 10_000)
    assert storage.file_sha256(tmp_path / "file") == hashlib.sha256(bytes(range(256)) * 10_000).hexdigest()


def test_a_file_system_without_folder_sync_is_supported_but_a_broken_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for number, targets in ((22, [tmp_path / "file"]), (5, [tmp_path / "file", tmp_path])):

        def fail(descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        for target in targets:
            with pytest.raises(OSError):
                storage.sync(target)
        if number == 22:
            storage.sync(tmp_path)
