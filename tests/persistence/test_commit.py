"""Commit: exactly once, whoever comes last, whatever comes twice."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.commit import commit, persist
from stager.workers.checkpoint.commit.commit import partial_path, try_commit
from stager.workers.checkpoint.commit.persist import PartResult, discard_partial, persist_part
from stager.workers.checkpoint.directory.run_directory import partial_names, read_checkpoint
from stager.workers.checkpoint.documents.envelope import seal
from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.checkpoint.documents.receipt import receipt_name
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix import files, transitions
from stager.workers.checkpoint.storage.posix.file_system import FileSystem
from stager.workers.checkpoint.storage.posix.own_files import remove_own
from stager.workers.checkpoint.write.write_task import WriteTask, read_layout
from stager.workers.errors import CorruptCheckpointError, StorageError
from tests.persistence.tasks import load, make_task, run, save
from tests.states import same

OLD, NEW = {"x": torch.zeros(100)}, {"x": torch.ones(100), "y": 2}


@pytest.fixture(params=[True, False], ids=["renameat2", "no renameat2"])
def exchange(request: pytest.FixtureRequest) -> bool:
    """With and without a file system that can exchange two names."""
    if not request.param:
        request.getfixturevalue("no_exchange")
    return bool(request.param)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], None]:
    """Do something when a point is reached for the first time."""

    def arm(name: str, action: Callable[[], None]) -> None:
        armed = [action]

        def point(reached: str) -> None:
            if reached == name and armed:
                armed.pop()()

        monkeypatch.setattr(commit, "point", point)
        monkeypatch.setattr(persist, "point", point)
        monkeypatch.setattr(transitions, "point", point)

    return arm


def only_checkpoint(run_dir: Path, job: WriteTask, state: dict[str, object]) -> None:
    """The job's checkpoint is there, whole, under its name, and nothing else is."""
    info, _ = read_checkpoint(str(run_dir), job.spec.step)
    assert info.save_id == job.spec.save_id
    assert verify_checkpoint(info.path).problems == ()
    assert same(load(info), state)
    assert os.listdir(run_dir) == [Path(info.path).name]


def test_existing_step_is_replaced(run_dir: Path, exchange: bool) -> None:
    save(run_dir, OLD)
    job = make_task(run_dir, NEW)
    run(job)
    only_checkpoint(run_dir, job, NEW)


def test_file_system_that_cannot_exchange_says_so_by_its_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run_dir, OLD)
    for code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        with monkeypatch.context() as patch:
            patch.setattr(files, "_libc", type("Libc", (), {"renameat2": staticmethod(lambda *_: -1)}))
            patch.setattr("ctypes.get_errno", lambda code=code: code)
            job = make_task(run_dir, NEW)
            run(job)
        only_checkpoint(run_dir, job, NEW)


@pytest.mark.usefixtures("no_exchange")
def test_failed_second_rename_puts_the_old_one_back(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(run_dir, OLD)
    original = os.rename

    def rename(source: str, target: str, **options: int) -> None:
        if str(target) == old.path and ".replaced" not in str(source) and Path(source).name != "x" and moved:
            raise OSError(errno.EIO, "")
        if str(source) == old.path:
            moved.append(target)
        original(source, target, **options)

    moved: list[str] = []
    monkeypatch.setattr(os, "rename", rename)
    job = make_task(run_dir, NEW)
    with pytest.raises(StorageError) as raised:
        run(job)
    assert raised.value.errno == errno.EIO and moved
    discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id)
    assert same(load(read_checkpoint(str(run_dir), 1)[0]), OLD)
    assert os.listdir(run_dir) == ["step-00000001"]


@pytest.mark.parametrize("kind", ["directory", "file", "link", "dangling link"])
def test_what_is_in_the_way_and_is_no_checkpoint_is_moved_aside_and_kept(
    run_dir: Path, tmp_path: Path, kind: str
) -> None:
    run_dir.mkdir()
    final, mine = run_dir / "step-00000001", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    if kind == "directory":
        mine.rename(final)
    elif kind == "file":
        final.write_text("mine")
    else:
        final.symlink_to(mine if kind == "link" else tmp_path / "none")
    job = make_task(run_dir, NEW)
    info = run(job).info
    assert verify_checkpoint(info.path).ok and same(load(info), NEW)
    (aside,) = [p for p in run_dir.iterdir() if p != final]
    assert aside.name == f"step-00000001.not-a-checkpoint-{job.spec.save_id}"
    assert kind == "dangling link" or (aside / "thesis" if aside.is_dir() else aside).read_text() == "mine"
    assert not partial_names(str(run_dir))


def test_damaged_checkpoint_is_replaced(run_dir: Path) -> None:
    Path(save(run_dir, OLD).path, "manifest.json").write_text("damaged")
    job = make_task(run_dir, NEW)
    run(job)
    only_checkpoint(run_dir, job, NEW)


def test_part_that_is_run_again_during_the_commit_waits_and_learns_of_it(
    run_dir: Path, at: Callable[[str, Callable[[], None]], None], exchange: bool
) -> None:
    """1. part 1 holds the exclusive lock and writes the manifest; 2. part 0, run again because its worker died before it
    answered, opens the directory and waits for the lock; 3. part 1 renames; 4. part 0 has the lock of a directory that is
    called otherwise now."""
    save(run_dir, OLD)
    job = make_task(run_dir, NEW, num_parts=2)
    persist_part(job, 0)
    results: list[PartResult] = []
    again = threading.Thread(target=lambda: results.append(persist_part(job, 0)))
    opened = threading.Event()
    original = FileSystem.create

    def create(self: FileSystem, path: str) -> Entry:
        entry = original(self, path)
        opened.set()
        return entry

    def begin() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileSystem, "create", create)
            again.start()
            opened.wait()

    at("commit.manifest", begin)
    committed = persist_part(job, 1).committed
    again.join()
    assert committed is not None and results[0].committed is not None
    assert results[0].committed.info == committed.info
    only_checkpoint(run_dir, job, NEW)


@pytest.mark.parametrize("where", ["part.begin", "part.opened"])
@pytest.mark.parametrize("replacing", [True, False])
def test_part_that_is_run_again_just_before_the_rename_leaves_nothing(
    run_dir: Path, at: Callable[[str, Callable[[], None]], None], exchange: bool, where: str, replacing: bool
) -> None:
    """The commit happens between the look of a late part and its first step: the directory it then makes, or the older
    checkpoint that it then finds under the partial name, is not written to and does not stay."""
    run_dir.mkdir()
    if replacing:
        save(run_dir, OLD)
    job = make_task(run_dir, NEW, num_parts=2)
    persist_part(job, 0)
    at(where, lambda: run_part(job, 1))
    late = persist_part(job, 0)
    assert late.committed is not None and late.committed.info.save_id == job.spec.save_id
    only_checkpoint(run_dir, job, NEW)


def run_part(job: WriteTask, part: int) -> None:
    assert persist_part(job, part).committed is not None


@pytest.mark.parametrize("late", ["part", "commit"])
def test_older_checkpoint_under_the_partial_name_is_never_taken_for_this_save(
    run_dir: Path, at: Callable[[str, Callable[[], None]], None], late: str
) -> None:
    """Between the exchange of names and the removal of the old one, somebody late opens the partial name: it is the old
    checkpoint, with a manifest, and with nobody holding its lock. Publishing that would lose the new one."""
    save(run_dir, OLD)
    job = make_task(run_dir, NEW, num_parts=2)
    persist_part(job, 0)
    seen: list[object] = []

    def come_late() -> None:
        assert Path(partial_path(job.spec), "manifest.json").exists()
        if late == "part":
            seen.append(persist_part(job, 0).committed)
        else:
            seen.append(try_commit(job.spec, read_layout(job)))

    at("commit.replaced", come_late)
    run_part(job, 1)
    assert seen[0] is not None
    only_checkpoint(run_dir, job, NEW)


def test_many_parts_at_once_commit_exactly_once(run_dir: Path) -> None:
    """Threads stand for workers: each opens its own descriptors, so the locks are between them. Some of them lose their
    answer (a worker that dies just before it replies), so their part is run again."""
    rng = random.Random(3)
    save(run_dir, OLD, step=0)
    for number in range(30):
        state = {"x": torch.full((500,), float(number))}
        job = make_task(run_dir, state, step=number // 2, num_parts=6, fsync=False)
        start = threading.Barrier(6)
        results: list[PartResult] = []
        runs = [rng.choice((1, 1, 2, 3)) for _ in range(6)]
        arguments = [(job, part, runs[part], start, results) for part in range(6)]
        threads = [threading.Thread(target=work, args=each) for each in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == sum(runs)
        assert any(result.committed for result in results)
        assert not partial_names(str(run_dir))
        info, _ = read_checkpoint(str(run_dir), job.spec.step)
        assert info.save_id == job.spec.save_id and same(load(info), state)


def work(job: WriteTask, part: int, runs: int, start: threading.Barrier, results: list[PartResult]) -> None:
    start.wait()
    for _ in range(runs):
        results.append(persist_part(job, part))


def change_receipt(job: WriteTask, **changes: object) -> None:
    partial = partial_path(job.spec)
    with storage_of(partial).open(partial) as entry:
        receipt = commit.read_receipt(entry, 0, 0, job.spec.num_parts, job.spec.save_id)
    assert receipt is not None
    Path(partial, receipt_name(0, 0, job.spec.num_parts)).write_bytes(seal({**asdict(receipt), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"save_id": "00"},
        {"rank": 1},
        {"part": 1},
        {"num_parts": 3},
        {"hashes": []},
        {"hashes": [1]},
        {"hashes": 5},
        {"extra": 1},
    ],
    ids=str,
)
def test_receipt_of_something_else_is_refused(run_dir: Path, changes: dict[str, object]) -> None:
    run_dir.mkdir()
    job = make_task(run_dir, num_parts=2)
    persist_part(job, 0)
    change_receipt(job, **changes)
    with pytest.raises(CorruptCheckpointError, match="receipt"):
        persist_part(job, 1)
    discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id)
    assert os.listdir(run_dir) == []


def test_partial_directory_removed_while_it_is_written_is_an_error_with_its_path(
    run_dir: Path, at: Callable[[str, Callable[[], None]], None]
) -> None:
    run_dir.mkdir()
    job = make_task(run_dir, num_parts=1)
    at("part.receipt", lambda: remove_own(partial_path(job.spec)))
    with pytest.raises(StorageError, match="was removed while it was being written") as raised:
        persist_part(job, 0)
    assert raised.value.path == partial_path(job.spec)
    assert os.listdir(run_dir) == []


def test_what_was_discarded_is_not_committed_by_whoever_still_writes(
    run_dir: Path, at: Callable[[str, Callable[[], None]], None]
) -> None:
    """Another rank, which has told that the save failed. Who wrote until then removes what is left."""
    run_dir.mkdir()
    job = make_task(run_dir, NEW, num_parts=1)
    at("part.receipt", lambda: discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id, wait_secs=0.05))
    with pytest.raises(StorageError, match="was removed while it was being written"):
        persist_part(job, 0)
    assert os.listdir(run_dir) == [f"step-00000001.removing-{job.spec.save_id}"]
    discard_partial(str(run_dir), checkpoint_name(1), job.spec.save_id)
    assert os.listdir(run_dir) == []


def test_manifest_that_nobody_would_read_is_not_committed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, object] = {str(i): torch.ones(3) for i in range(50)}
    nbytes = Path(save(run_dir, state).path, "manifest.json").stat().st_size
    monkeypatch.setattr(files, "DOCUMENT_BYTES", nbytes - 100)  # times differ in length
    job = make_task(run_dir, state, step=2)
    with pytest.raises(StorageError, match=r"docs/scale\.md") as raised:
        run(job)
    assert raised.value.errno == errno.EFBIG
    discard_partial(str(run_dir), checkpoint_name(2), job.spec.save_id)
    assert os.listdir(run_dir) == ["step-00000001"]


def test_leftovers_in_the_partial_directory_do_not_reach_the_checkpoint(run_dir: Path) -> None:
    run_dir.mkdir()
    job = make_task(run_dir, NEW, num_parts=2)
    persist_part(job, 0)
    partial = Path(partial_path(job.spec))
    (partial / "manifest.json.1.tmp").touch()
    (partial / "__9_0.distcp").touch()
    (partial / "save-1.json").symlink_to(run_dir)
    persist_part(job, 1)
    only_checkpoint(run_dir, job, NEW)


def test_two_saves_of_one_step_leave_the_later_one(run_dir: Path) -> None:
    run_dir.mkdir()
    first, second = make_task(run_dir, OLD), make_task(run_dir, NEW)
    persist_part(first, 0)
    persist_part(second, 0)
    persist_part(first, 1)
    persist_part(second, 1)
    only_checkpoint(run_dir, second, NEW)


def test_step_of_many_digits(run_dir: Path) -> None:
    step = 10**30
    info = save(run_dir, NEW, step=step)
    assert info.step == step and read_checkpoint(str(run_dir), step)[0] == info
    assert replace(info, step=0).path.endswith(f"step-{step}")


def test_checkpoint_that_is_replaced_is_locked_while_it_loses_its_name(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention takes the same lock alone: else it could take the new checkpoint for the old one, and remove it."""
    save(run_dir)
    exchange, replaced = files.exchange, []

    def exchange_under_lock(partial: str, final: str) -> bool:
        retention = os.open(final, os.O_RDONLY | os.O_DIRECTORY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(retention, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(retention)
        replaced.append(final)
        return exchange(partial, final)

    monkeypatch.setattr(files, "exchange", exchange_under_lock)
    save(run_dir)
    assert replaced == [str(run_dir / "step-00000001")]
