"""The commit of many ranks, in threads: as whole, in the same order, with the same errors as in one."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stager.snapshot.batches import batch
from stager.snapshot.copying import Copier
from stager.snapshot.pieces import whole
from stager.snapshot.slab_writer import SlabWriter
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner
from stager.workers.checkpoint.commit import commit, persist
from stager.workers.checkpoint.commit.commit import Committed, commit_recorded, num_threads, partial_path
from stager.workers.checkpoint.commit.persist import discard_partial
from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.checkpoint.documents.receipt import receipt_name
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.maintenance import recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import open_regular
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import WriteTask, record_name
from stager.workers.errors import CorruptCheckpointError, StorageError
from stager.workers.memory.slab import Slab
from tests.persistence.tasks import load, save

NUM_RANKS = 23


def _job(directory: Path, rank: int) -> WriteTask:
    file_format = get_format("dcp")
    flat = flatten({"own": {f"rank-{rank}": {"weight": torch.full((50,), float(rank)), "number": rank}}})
    plan = Planner(file_format, 1, 64 << 20, rank).plan(flat)
    blobs = [file_format.object_blob(flat.leaves[leaf], leaf).blob for leaf in plan.objects]
    pieces = whole(plan, blobs, 1)
    slab = Slab.create(pieces.slab_nbytes)
    Copier(1).copy(batch(plan.copies), flat.leaves, slab)
    spec = SaveSpec(
        directory=str(directory),
        step=1,
        save_id="0123456789abcdef",
        kind="dcp",
        num_parts=1,
        fsync=True,
        created=time.time(),
        stager="0",
        torch="2",
        rank=rank,
        num_ranks=NUM_RANKS,
    )
    return SlabWriter().write(spec, pieces, pieces.pieces[0], slab, frozenset({slab.slab_id}))


@pytest.fixture
def written(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SaveSpec]:
    """Every part, and no commit: rank 0's spec."""
    run_dir.mkdir()
    jobs = [_job(run_dir, rank) for rank in range(NUM_RANKS)]
    with monkeypatch.context() as patch:
        patch.setattr(persist, "try_commit", lambda *_: None)
        for job in jobs:
            persist.persist_part(job, 0)
    yield jobs[0].spec
    discard_partial(str(run_dir), checkpoint_name(1), jobs[0].spec.save_id)


def test_many_ranks_have_threads_and_one_rank_has_none(
    run_dir: Path, written: SaveSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    done = commit_recorded(written)
    assert started == ["stager-at-once"] * 2 * (num_threads(NUM_RANKS) - 1) and started
    assert done is not None and verify_checkpoint(done.info.path).ok
    state = load(done.info)["own"]
    assert [state[f"rank-{rank}"]["number"] for rank in range(NUM_RANKS)] == list(range(NUM_RANKS))
    assert not [name for name in os.listdir(done.info.path) if name.endswith(".json") and name != "manifest.json"]

    started.clear()
    save(run_dir, {"x": torch.ones(3)}, step=2)
    assert not started


@pytest.mark.parametrize(
    ("num_ranks", "expected"), [(1, 1), (2, 1), (7, 1), (8, 2), (127, 31), (128, 32), (1 << 24, 32)]
)
def test_threads_grow_with_the_ranks(num_ranks: int, expected: int) -> None:
    assert num_threads(num_ranks) == expected


@pytest.mark.parametrize("name", [receipt_name(9, 0, 1), record_name(9)])
def test_a_file_that_cannot_be_read_is_named(
    name: str, run_dir: Path, written: SaveSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several, the first: as if they were read one after the other."""

    def refuse(path: str) -> int:
        if os.path.basename(path) in (name, record_name(10), receipt_name(17, 0, 1)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return open_regular(path)

    monkeypatch.setattr(files, "open_regular", refuse)
    with pytest.raises(StorageError) as caught:
        commit_recorded(written)
    assert caught.value.errno == errno.EIO
    cause = caught.value.__cause__
    assert isinstance(cause, OSError) and str(cause.filename).endswith(name)
    monkeypatch.undo()
    assert isinstance(commit_recorded(written), Committed)


@pytest.mark.parametrize("name", [receipt_name(9, 0, 1), record_name(9)])
def test_a_file_that_is_damaged_is_named(name: str, run_dir: Path, written: SaveSpec) -> None:
    for damaged in (name, record_name(21)):
        Path(partial_path(written), damaged).write_text("damaged")
    with pytest.raises(CorruptCheckpointError, match=name):
        commit_recorded(written)


def test_a_receipt_that_was_taken_away_meanwhile_is_missing(
    run_dir: Path, written: SaveSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = commit.read_receipt

    def missing(entry: Entry, rank: int, *others: Any) -> Any:
        return None if rank == 11 else read(entry, rank, *others)

    monkeypatch.setattr(commit, "read_receipt", missing)
    assert commit_recorded(written) is None


def test_all_that_is_removed_is_removed_before_the_sync_and_that_before_the_rename(
    run_dir: Path, written: SaveSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removals of one thread are held up until all others have nothing left to do."""
    order: list[str] = []
    partial = partial_path(written)
    last, left = os.path.join(partial, record_name(3)), threading.Semaphore(0)
    remove, fsync, rename = files.remove, os.fsync, os.rename

    def removing(path: str) -> None:
        if path == last:
            for _ in range(2 * NUM_RANKS - 1):
                assert left.acquire(timeout=60)
        remove(path)
        order.append("remove")
        left.release()

    def renaming(source: str, target: str, **kwargs: Any) -> None:
        order.append("rename" if source == partial else "")
        rename(source, target, **kwargs)

    monkeypatch.setattr(files, "remove", removing)
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "rename", renaming)
    assert commit_recorded(written) is not None
    begin = order.index("remove")
    assert order[begin:] == ["remove"] * 2 * NUM_RANKS + ["sync", "rename", "sync"]


def test_what_cannot_be_removed_stops_the_commit_before_the_rename(
    run_dir: Path, written: SaveSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = files.remove

    def refuse(path: str) -> None:
        if path.endswith(receipt_name(5, 0, 1)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        remove(path)

    monkeypatch.setattr(files, "remove", refuse)
    with pytest.raises(StorageError) as caught:
        commit_recorded(written)
    assert caught.value.errno == errno.EROFS and "read-only" in str(caught.value)
    cause = caught.value.__cause__
    assert isinstance(cause, OSError) and str(cause.filename).endswith(receipt_name(5, 0, 1))
    assert not (run_dir / "step-00000001").exists()
    monkeypatch.undo()
    assert [found.outcome.value for found in recover.recover(str(run_dir))] == ["committed"]
    assert verify_checkpoint(run_dir / "step-00000001").ok
