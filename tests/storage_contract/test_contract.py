"""What ``workers/checkpoint/storage`` promises, kept by each storage.

A save is what ``make_task`` hands over; its parts run in this process.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from stager.loading.restore import Restorer
from stager.workers.checkpoint.commit.commit import commit_recorded, manifest_of, put_in_place
from stager.workers.checkpoint.commit.persist import discard_partial, persist_part, withdraw
from stager.workers.checkpoint.directory.manifest_file import read_header, read_manifest
from stager.workers.checkpoint.directory.protected import change_protected_steps, read_protected
from stager.workers.checkpoint.directory.run_directory import (
    committed_steps,
    list_checkpoints,
    partial_names,
    read_checkpoint,
    withdrawn_names,
)
from stager.workers.checkpoint.documents.names import partial_name
from stager.workers.checkpoint.maintenance import retention_rules
from stager.workers.checkpoint.maintenance.recover import RecoverOutcome, recover
from stager.workers.checkpoint.maintenance.retention import PruneFate, prune, remove
from stager.workers.checkpoint.maintenance.retention_rules import KeepBest, RetentionRules
from stager.workers.checkpoint.read.blob_reader import BlobReader
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.storage import Storage
from stager.workers.checkpoint.write.write_task import WriteTask, read_layout
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, DirectoryInUseError, StorageError
from tests.object_stores.test_checkpointer import objects
from tests.persistence.tasks import make_task
from tests.states import same

STATE = {"a": torch.arange(90_000.0), "many": [torch.full((5,), float(number)) for number in range(40)], "n": 3}


def task_of(directory: str, step: int = 1, **options: Any) -> WriteTask:
    return make_task(directory, {**STATE, "n": step}, step=step, **options)  # type: ignore[arg-type]  # it may be a URL


def write(task: WriteTask, *, but: int = 0) -> None:
    """Write all parts but the last ``but`` ones."""
    for part in range(task.spec.num_parts - but):
        persist_part(task, part)


def partial_of(task: WriteTask) -> str:
    return os.path.join(task.spec.directory, partial_name(task.spec.final_name, task.spec.save_id))


def final_of(task: WriteTask) -> str:
    return os.path.join(task.spec.directory, task.spec.final_name)


def is_committed(task: WriteTask) -> None:
    info, _ = read_checkpoint(task.spec.directory, task.spec.step)
    assert info.save_id == task.spec.save_id and verify_checkpoint(info.path).ok
    assert same(restorer_of(task), {**STATE, "n": task.spec.step})


def restorer_of(task: WriteTask) -> Any:
    info, manifest = read_checkpoint(task.spec.directory, task.spec.step)
    return Restorer(info.path, manifest, 2, allow_pickle=False).load()


def test_a_directory_in_which_nothing_is(directory: str) -> None:
    assert committed_steps(directory) == [] == partial_names(directory) and withdrawn_names(directory) == []
    assert list_checkpoints(directory) == ([], [])
    storage = storage_of(directory)
    assert not storage.exists(f"{directory}/step-00000001") and not storage.has_manifest(f"{directory}/step-00000001")
    for look in (storage.read_manifest, storage.open, storage.file_names if storage.guarantees.links else storage.open):
        with pytest.raises(FileNotFoundError):
            look(f"{directory}/step-00000001")


def test_a_save_is_seen_when_its_last_part_is_written_and_not_before(directory: str) -> None:
    task = task_of(directory)
    write(task, but=1)
    assert committed_steps(directory) == []
    assert partial_names(directory) == [os.path.basename(partial_of(task))]
    assert persist_part(task, task.spec.num_parts - 1).committed is not None
    assert committed_steps(directory) == [1] and partial_names(directory) == []
    is_committed(task)


def test_a_part_that_is_run_again_changes_nothing(directory: str) -> None:
    task = task_of(directory)
    for part in (0, 0, 1, 1, 0):
        persist_part(task, part)
    is_committed(task)
    assert partial_names(directory) == []


def test_small_files_are_there_as_a_whole(directory: str) -> None:
    task = task_of(directory)
    with storage_of(directory).create(partial_of(task)) as entry:
        assert entry.read("receipt-0-0-of-9.json") is None
        for data in (b"", b"first", b"x" * 100_000, b"last"):
            entry.put("receipt-0-0-of-9.json", data, sync=True)
            assert entry.read("receipt-0-0-of-9.json") == data
        entry.put("save-0.json", b"1", sync=False)
        assert sorted(entry.names()) == ["receipt-0-0-of-9.json", "save-0.json"]
        entry.remove_unnamed({"save-0.json"}, 2)
        assert entry.names() == ["save-0.json"]
    nothing_is_left(directory)


def test_ranges_of_data_are_read_as_they_were_written(directory: str) -> None:
    write(task_of(directory))
    info, manifest = read_checkpoint(directory, 1)
    storage, chance = storage_of(directory), random.Random(1)
    for number, spec in enumerate(manifest.layout.files):
        file = storage.open_data(info.path, manifest, number)
        try:
            whole = bytearray(spec.nbytes)
            fill(file.read_into, memoryview(whole), 0)
            for _ in range(5):
                start = chance.randrange(spec.nbytes)
                some = bytearray(chance.randrange(1, 5000))
                got = fill(file.read_into, memoryview(some), start)
                assert bytes(some[:got]) == bytes(whole[start : start + len(some)])
            assert file.nbytes == spec.nbytes and file.read_into(memoryview(bytearray(1)), spec.nbytes) == 0
        finally:
            file.close()
    with BlobReader(info.path, manifest, 4) as reader:
        reader.read(range(len(manifest.layout.items)))


def fill(read_into: Callable[[memoryview, int], int], buffer: memoryview, offset: int) -> int:
    """Read until the buffer is full or the file ends. Returns how many bytes it got."""
    total = 0
    while total < len(buffer) and (count := read_into(buffer[total:], offset + total)):
        total += count
    return total


@pytest.mark.parametrize("but", [2, 1])
def test_a_save_that_was_interrupted_is_removed(directory: str, but: int) -> None:
    task = task_of(directory)
    write(task, but=but)
    with storage_of(directory).create(partial_of(task)) as entry:  # begun, at least
        entry.put("receipt-7-7-of-9.json", b"", sync=False)
    (found,) = recover(directory)
    assert found.outcome is RecoverOutcome.REMOVED
    nothing_is_left(directory)


def test_a_save_whose_commit_was_interrupted_is_committed(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(directory)
    with monkeypatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.commit.persist.try_commit", lambda *_: None)
        write(task)
    assert committed_steps(directory) == []
    (found,) = recover(directory)
    assert found.outcome is RecoverOutcome.COMMITTED
    is_committed(task)
    assert recover(directory) == []


def test_a_commit_is_found_to_have_happened(directory: str) -> None:
    task = task_of(directory)
    write(task)
    again = commit_recorded(task.spec)
    assert again is not None and again.info.save_id == task.spec.save_id
    is_committed(task)


def test_a_withdrawn_save_is_never_committed(directory: str) -> None:
    task = task_of(directory)
    write(task, but=1)
    withdraw(directory, task.spec.final_name, task.spec.save_id)
    with pytest.raises(StorageError):
        persist_part(task, task.spec.num_parts - 1)
    assert committed_steps(directory) == []
    discard_partial(directory, task.spec.final_name, task.spec.save_id)
    nothing_is_left(directory)


def test_a_save_that_was_withdrawn_before_it_wrote_anything_leaves_nothing(directory: str) -> None:
    task = task_of(directory)
    withdraw(directory, task.spec.final_name, task.spec.save_id)
    with pytest.raises(StorageError):
        persist_part(task, 0)
    nothing_is_left(directory)


def test_a_checkpoint_of_any_name(directory: str) -> None:
    names = ["last.ckpt", "epoch=0-step=2", "a b", "50%", "a%20b", "x#y", "w\u00e4rme", "{z}~1^"]
    for step, name in enumerate(names):
        task = task_of(directory, step=step)
        write(replace(task, spec=replace(task.spec, name=name)))
        assert storage_of(directory).has_manifest(f"{directory}/{name}"), name
        assert verify_checkpoint(f"{directory}/{name}").ok, name
    assert committed_steps(directory) == list(range(len(names)))[::-1] and partial_names(directory) == []
    assert {info.path for info in list_checkpoints(directory)[0]} == {f"{directory}/{name}" for name in names}
    for step in range(len(names)):
        remove(directory, step)
    nothing_is_left(directory)


def test_of_a_commit_and_a_withdrawal_at_once_one_happens(directory: str) -> None:
    for number in range(6):
        task = task_of(directory, step=number)
        write(task, but=1)
        begin, refused = threading.Barrier(2), list[BaseException]()

        def finish(task: WriteTask = task, begin: threading.Barrier = begin, told: list[Any] = refused) -> None:
            begin.wait()
            try:
                persist_part(task, task.spec.num_parts - 1)
            except StorageError as error:
                told.append(error)

        thread = threading.Thread(target=finish)
        thread.start()
        begin.wait()
        withdraw(directory, task.spec.final_name, task.spec.save_id)
        thread.join()
        if committed_steps(directory):
            is_committed(task)
            assert not refused
            remove(directory, number)
        else:
            assert refused
        discard_partial(directory, task.spec.final_name, task.spec.save_id)
        nothing_is_left(directory)


def test_a_later_save_takes_the_place_of_an_earlier_one(directory: str) -> None:
    for _ in range(3):
        task = task_of(directory)
        write(task)
        is_committed(task)
    assert committed_steps(directory) == [1]
    assert recover(directory) == []


def test_a_checkpoint_that_is_removed_is_gone_at_once(directory: str) -> None:
    for step in (1, 2):
        write(task_of(directory, step))
    report = remove(directory, 1)
    assert [verdict.fate for verdict in report.verdicts] == [PruneFate.REMOVED] and report.freed_bytes > 300_000
    assert committed_steps(directory) == [2]
    assert withdrawn_names(directory) == []


def test_a_removal_that_was_interrupted_goes_on(directory: str) -> None:
    for step in (1, 2):
        write(task_of(directory, step))
    storage = storage_of(directory)
    path = f"{directory}/step-00000001"
    assert storage.rename(path, storage.removing_path(path))
    assert committed_steps(directory) == [2] and len(withdrawn_names(directory)) == 1
    (found,) = recover(directory)
    assert found.outcome is RecoverOutcome.REMOVED
    assert committed_steps(directory) == [2] and withdrawn_names(directory) == []


def test_an_entry_knows_whether_it_still_has_its_name(directory: str) -> None:
    task = task_of(directory)
    write(task, but=1)
    storage = storage_of(directory)
    with storage.open(partial_of(task)) as entry:
        assert entry.is_still()
        withdraw(directory, task.spec.final_name, task.spec.save_id)
        assert not entry.is_still()
    other = task_of(directory, 2)
    write(other)
    with storage.open(final_of(other)) as entry:
        assert entry.is_still()
        write(task_of(directory, 2))
        assert not entry.is_still()


def test_what_cannot_be_replaced_stays_under_another_name(directory: str) -> None:
    """Only a file system holds what is not stager's."""
    storage: Storage = storage_of(directory)
    if not storage.guarantees.foreign_files:
        pytest.skip("nobody else writes there")
    os.mkdir(f"{directory}/step-00000001")
    os.mkdir(f"{directory}/step-00000001/theirs")
    write(task_of(directory))
    assert committed_steps(directory) == [1]
    assert any("not-a-checkpoint" in name for name in os.listdir(directory))


def test_the_lock_keeps_others_out_until_it_is_given_back(directory: str) -> None:
    storage = storage_of(directory)
    lock = storage.lock(directory, 0, "a" * 16)
    try:
        assert storage.lock_nonce(directory) == "a" * 16
        storage.check_holder(directory, "a" * 16)
        with pytest.raises(DirectoryInUseError):
            storage.lock(directory, 0, "b" * 16)
        with pytest.raises(DirectoryInUseError), storage.unused(directory):
            pass
        lock.share()
        storage.lock(directory, 5, "a" * 16, shared=True).close()
    finally:
        lock.close()
    with storage.unused(directory):
        pass
    storage.lock(directory, 5, "c" * 16).close()


def test_a_small_file_of_the_run_is_changed_by_many_at_once(directory: str) -> None:
    def add(step: int) -> None:
        change_protected_steps(directory, lambda steps: steps | {step})

    assert read_protected(directory) == frozenset()
    threads = [threading.Thread(target=add, args=(step,)) for step in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_protected(directory) == frozenset(range(6))


def test_a_fingerprint_changes_with_the_checkpoint(directory: str) -> None:
    write(task_of(directory))
    storage, path = storage_of(directory), f"{directory}/step-00000001"
    before = storage.fingerprint(path)
    assert before == storage.fingerprint(path)
    write(task_of(directory))
    assert before != storage.fingerprint(path)


def test_a_manifest_alone_makes_the_checkpoint(directory: str) -> None:
    """The index files are put before it; with the manifest, and without the last step, there is none."""
    task = task_of(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.commit.persist.try_commit", lambda *_: None)
        write(task)
    with storage_of(directory).open(partial_of(task)) as entry:
        manifest = manifest_of(task.spec, read_layout(task), entry)
        assert manifest is not None and committed_steps(directory) == []
        put_in_place(entry, final_of(task), manifest, fsync=True)
    is_committed(task)
    assert read_manifest(final_of(task)).header.save_id == task.spec.save_id


def nothing_is_left(directory: str) -> None:
    recover(directory)  # a part that began late may have made its directory again
    assert recover(directory) == [] and partial_names(directory) == [] == withdrawn_names(directory)
    if "://" in directory:
        assert [key for key in objects(directory) if not key.startswith(".stager.lock")] == []
    else:
        assert [name for name in os.listdir(directory) if name != ".stager.lock"] == []


@pytest.mark.parametrize("rules", [{"keep_best": KeepBest("loss", "min", 1)}, {"keep_every_secs": 0.0001}])
def test_rules_that_read_manifests_keep_what_they_say(directory: str, rules: dict[str, Any]) -> None:
    for step, loss in ((1, 0.1), (2, 0.5), (3, 0.7)):
        task = task_of(directory, step=step)
        write(replace(task, spec=replace(task.spec, metrics={"loss": loss})))
    report = prune(directory, RetentionRules(keep_latest=1, **rules))
    kept = [1, 3] if "keep_best" in rules else [1, 2, 3]
    assert sorted(report.steps(PruneFate.KEPT)) == kept == committed_steps(directory)[::-1]


def test_a_manifest_that_cannot_be_read_now_is_no_reason_to_remove_the_best(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, loss in ((1, 0.1), (2, 0.5), (3, 0.7)):
        task = task_of(directory, step=step)
        write(replace(task, spec=replace(task.spec, metrics={"loss": loss})))

    def fails(path: str) -> Any:
        if path.endswith("step-00000001"):
            raise CorruptCheckpointError(path, "cannot be read: Input/output error")
        return read_header(path)

    monkeypatch.setattr(retention_rules, "read_header", fails)
    prune(directory, RetentionRules(keep_latest=1, keep_best=KeepBest("loss", "min", 1)))
    assert committed_steps(directory) == [3, 2, 1]


def test_two_who_remove_the_same_checkpoints_at_once(directory: str) -> None:
    steps = list(range(5))
    for step in steps:
        write(task_of(directory, step=step))
    begin, said = threading.Barrier(2), list[str]()

    def remove_all() -> None:
        for step in steps:
            begin.wait()
            try:
                (verdict,) = remove(directory, step).verdicts
                said.append(verdict.fate.value if verdict.fate is PruneFate.REMOVED else verdict.reason)
            except CheckpointNotFoundError:
                said.append("removed")

    threads = [threading.Thread(target=remove_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(said) == {"removed"} or set(said) == {"removed", "it is being read"}, said
    assert committed_steps(directory) == []
    prune(directory, RetentionRules())
    nothing_is_left(directory)
