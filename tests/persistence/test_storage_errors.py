"""What the file system can do to a save: each ends in an error with path and cause, and nothing else is harmed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stager import Checkpointer
from stager.workers.checkpoint.commit.persist import discard_partial
from stager.workers.checkpoint.directory.run_directory import (
    committed_steps,
    list_checkpoints,
    partial_names,
    read_checkpoint,
)
from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.checkpoint.formats.torch_save import header_and_tail
from stager.workers.checkpoint.layout.layout import align
from stager.workers.checkpoint.maintenance.recover import RecoverOutcome, recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.posix.run_lock import LOCK_NAME, lock_directory
from stager.workers.errors import DirectoryInUseError, StorageError
from tests.persistence.tasks import failing_call, in_turn, load, make_task, run, save
from tests.small_disk import small_disk_at
from tests.states import same

OLD, NEW = {"x": torch.zeros(100)}, {"x": torch.ones(100), "y": {"z": torch.arange(9)}, "o": 2}
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE]


@pytest.mark.parametrize("step, code", [(1, errno.EIO), (2, errno.ENOSPC)], ids=["replacing", "another step"])
def test_error_at_each_system_call(tmp_path: Path, step: int, code: int) -> None:
    """The save fails with a StorageError of this errno and a path, or does without the call; the earlier checkpoint is
    valid; nothing partial stays; the next save works."""
    failures = 0

    def attempt(number: int) -> bool:
        nonlocal failures
        run_dir = tmp_path / str(number)
        save(run_dir, OLD, step=1, fsync=False)
        job = make_task(run_dir, NEW, step=step)
        with failing_call(number, lambda name: OSError(code, os.strerror(code))) as reached:
            try:
                run(job)
            except StorageError as error:
                failures += 1
                assert error.errno == code and os.path.commonpath([error.path, run_dir]) == str(run_dir)
                assert os.strerror(code) in str(error)
                discard_partial(str(run_dir), checkpoint_name(step), job.spec.save_id)  # as the trainer has it done
        if partial_names(str(run_dir)):  # only the replaced one, when what failed was its removal
            assert read_checkpoint(str(run_dir), step)[0].save_id == job.spec.save_id
            assert [found.outcome for found in recover(str(run_dir))] == [RecoverOutcome.REMOVED]
        committed, skipped = list_checkpoints(run_dir)
        assert not skipped and all(verify_checkpoint(info.path).ok for info in committed)
        for info in committed:
            assert same(load(info), NEW if info.save_id == job.spec.save_id else OLD)
        run(make_task(run_dir, NEW, step=step, fsync=False))
        assert same(load(read_checkpoint(str(run_dir), step)[0]), NEW)
        shutil.rmtree(run_dir)
        return reached()

    assert in_turn(attempt) > 40
    assert failures > 30


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_message_says_what_to_do(run_dir: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    run_dir.mkdir()
    job = make_task(run_dir, NEW)

    def pwritev(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        with pytest.raises(StorageError, match=r"cannot write; .* \[") as raised:
            run(job)
    assert raised.value.errno == code
    discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id)
    assert os.listdir(run_dir) == []


def test_short_writes_are_continued(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: original(fd, [buffers[0][:7]], offset))
    state = {"x": torch.randn(300), "y": "text", "z": torch.arange(5)}
    info = save(run_dir, state)
    assert verify_checkpoint(info.path).ok and same(load(info), state)


def test_write_that_gets_nowhere_is_an_error_and_no_endless_loop(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.mkdir()
    job = make_task(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", lambda *_: 0)
        with pytest.raises(StorageError, match="dmesg"):
            run(job)
    discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id)


def test_short_reads_are_continued(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = save(run_dir, NEW)
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:5]], offset))
    assert verify_checkpoint(info.path).ok and same(load(info), NEW)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", 1 << 20) as mount:
        yield mount


@pytest.mark.parametrize("where", ["data", "receipt", "index", "manifest"])
def test_full_disk(small_disk: Path, where: str) -> None:
    """The disk has room for so many pages beside the data: record, receipt, index and manifest take one each."""
    pages_left = {"data": 0, "receipt": 1, "index": 2, "manifest": 3}[where]
    old = save(small_disk, OLD, step=1)
    stats = os.statvfs(small_disk)
    frame = sum(map(len, header_and_tail("uint8", (1 << 19,), (1,))))
    num_bytes = (stats.f_bavail - pages_left) * stats.f_frsize - align(frame)
    job = make_task(small_disk, {"x": torch.ones(num_bytes, dtype=torch.uint8)}, step=2, num_parts=1)
    with pytest.raises(StorageError, match="free space on this file system") as raised:
        run(job)
    name = {
        "data": "__0_0.distcp",
        "receipt": "receipt-0-0-of-1.json",
        "index": ".metadata",
        "manifest": "manifest.json",
    }[where]
    assert raised.value.errno == errno.ENOSPC and Path(raised.value.path).name == name
    discard_partial(str(small_disk), checkpoint_name(2), job.spec.save_id)
    assert committed_steps(str(small_disk)) == [1] and verify_checkpoint(old.path).ok
    assert not partial_names(str(small_disk))
    assert verify_checkpoint(save(small_disk, NEW, step=2).path).ok


def test_read_only_file_system(small_disk: Path) -> None:
    save(small_disk, OLD, step=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="mounted read-only"):
        run(make_task(small_disk, step=2))
    with pytest.raises(StorageError, match="mounted read-only"):
        lock_directory(str(small_disk), 0)
    assert [info.step for info in list_checkpoints(small_disk)[0]] == [1]


def test_run_directory_that_was_removed_is_not_made_again(run_dir: Path) -> None:
    """Nobody holds the lock of a new one."""
    run_dir.mkdir()
    job = make_task(run_dir)
    run_dir.rmdir()
    with pytest.raises(StorageError, match="was removed or renamed") as raised:
        run(job)
    assert raised.value.errno == errno.ENOENT
    assert not run_dir.exists()
    discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id)


def test_file_where_the_run_directory_should_be(run_dir: Path) -> None:
    run_dir.touch()
    with pytest.raises(StorageError) as raised:
        run(make_task(run_dir))
    assert raised.value.errno == errno.ENOTDIR
    with pytest.raises(StorageError):
        list_checkpoints(run_dir)
    with pytest.raises(StorageError):
        lock_directory(str(run_dir), 0)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_where_the_partial_directory_should_be(run_dir: Path, tmp_path: Path, kind: str) -> None:
    run_dir.mkdir()
    job = make_task(run_dir)
    partial = run_dir / f"step-00000001.partial-{job.spec.save_id}"
    partial.touch() if kind == "file" else partial.symlink_to(tmp_path)
    with pytest.raises(StorageError) as raised:
        run(job)
    assert raised.value.errno in (errno.ENOTDIR, errno.ELOOP)
    discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id)
    assert os.listdir(run_dir) == []


def test_directory_that_may_not_be_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = save(run_dir, OLD)

    def listdir(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, "", path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(StorageError, match="owner and mode"):
        list_checkpoints(run_dir)
    assert any("owner and mode" in problem for problem in verify_checkpoint(info.path).problems)


def test_lock_is_exclusive_names_its_owner_and_ends_with_its_descriptor(run_dir: Path) -> None:
    run_dir.mkdir()
    first = lock_directory(str(run_dir), 0)
    with pytest.raises(DirectoryInUseError, match=rf"trainer process {os.getpid()},.*after 0\.1 s"):
        lock_directory(str(run_dir), 0.1)
    os.close(first)
    os.close(lock_directory(str(run_dir), 0))


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_lock_that_is_no_file_is_refused_and_nothing_behind_a_link_is_touched(
    run_dir: Path, tmp_path: Path, kind: str
) -> None:
    run_dir.mkdir()
    victim, lock = tmp_path / "victim", run_dir / LOCK_NAME
    victim.write_text("precious")
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "directory":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(StorageError) as raised:
        lock_directory(str(run_dir), 0)
    assert raised.value.path == str(lock)
    assert victim.read_text() == "precious"


def test_lock_where_locks_do_not_work(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS without a lock daemon, for one."""
    import fcntl

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    run_dir.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    for use in (lambda: lock_directory(str(run_dir), 0), lambda: run(make_task(run_dir))):
        with pytest.raises(StorageError) as raised:
            use()
        assert raised.value.errno == errno.ENOLCK
    for name in partial_names(str(run_dir)):
        files.remove(str(run_dir / name))


@pytest.mark.parametrize("name", ["ü" * 20, "a b\n'\"$", "\udcff\udc80"], ids=["umlauts", "shell", "no UTF-8"])
def test_odd_directory_names(tmp_path: Path, name: str) -> None:
    info = save(tmp_path / name, NEW)
    assert verify_checkpoint(info.path).ok and same(load(info), NEW)


def test_path_that_is_too_long(tmp_path: Path) -> None:
    deep = tmp_path
    while len(str(deep)) < 4090:
        deep = deep / ("d" * 200)
    with pytest.raises(StorageError) as raised:
        run(make_task(deep))
    assert raised.value.errno == errno.ENAMETOOLONG


def test_files_follow_the_umask(run_dir: Path) -> None:
    previous = os.umask(0o027)
    try:
        path = Path(save(run_dir, NEW).path)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o640}


def test_what_is_said_to_be_missing_is_what_is_missing(tmp_path: Path) -> None:
    """That something was removed while it was in use is said only where it was there before."""

    def said(action: str, path: str) -> str:
        with pytest.raises(StorageError) as raised, storage_errors(action, path):
            raise FileNotFoundError(errno.ENOENT, "")
        return str(raised.value).removeprefix(f"{path}: cannot {action}; ").removesuffix(" [No such file or directory]")

    run, gone = str(tmp_path / "run"), str(tmp_path / "link")
    os.symlink("nowhere", gone)
    in_use = (
        "was removed or renamed while it was in use; undo that, or save again with a new Checkpointer or storage writer"
    )
    assert said("save", run) == f"it {in_use}"
    assert said("create", f"{run}/step-00000001.partial-ab") == f"{run} {in_use}"
    assert said("write", f"{run}/.stager.protected") == f"{run} {in_use}"
    assert said("write", f"{run}/x.pt") == f"the directory {run} does not exist; create it, or use another one"
    assert said("read", run) == "there is nothing of this name"
    assert said("create", f"{gone}/run") == f"the link {gone} leads nowhere"
    assert said("remove", str(tmp_path)).startswith("it was removed or renamed at this moment")


def test_directory_where_none_can_be_made() -> None:
    with pytest.raises(StorageError, match="/proc takes no new directories; use another one"):
        Checkpointer("/proc/runs/first", {"workers": {"count": 1}})


def test_run_directory_that_is_removed_while_it_is_in_use(run_dir: Path) -> None:
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        shutil.rmtree(run_dir)
        with pytest.raises(StorageError, match=f"{run_dir}: .*it was removed or renamed .* with a new Checkpointer"):
            ckpt.save(1, {"x": torch.ones(2)})
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        assert ckpt.save(1, {"x": torch.ones(2)}).upload_completion.result().step == 1
