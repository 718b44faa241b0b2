"""Crashes: at every system call of a save, and what the next run makes of the remains."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stager.workers.checkpoint.commit.commit import partial_path
from stager.workers.checkpoint.commit.persist import discard_unfinished, persist_part, quarantine
from stager.workers.checkpoint.directory.run_directory import list_checkpoints, partial_names, read_checkpoint
from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.documents.names import checkpoint_name, unfinished_name
from stager.workers.checkpoint.maintenance.recover import RecoveredDirectory, RecoverOutcome, recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.write.write_task import WriteTask
from tests.persistence.tasks import Crash, failing_call, in_turn, load, make_task, run, save
from tests.states import same

OLD, NEW = {"x": torch.zeros(100)}, {"x": torch.ones(100), "y": {"z": torch.arange(9)}, "o": 2}


@pytest.fixture(params=[True, False], ids=["renameat2", "no renameat2"])
def exchange(request: pytest.FixtureRequest) -> None:
    if not request.param:
        request.getfixturevalue("no_exchange")


def states_of(run_dir: Path) -> dict[int, Any]:
    """Every committed checkpoint, verified in full; nothing may be there that is not one."""
    committed, skipped = list_checkpoints(run_dir)
    assert not skipped
    for info in committed:
        assert verify_checkpoint(info.path).problems == ()
    return {info.step: load(info) for info in committed}


def crashes(run_dir: Path, number: int, task: WriteTask) -> bool:
    """Whether the ``number``-th system call of the task was reached; the process dies there."""
    with failing_call(number, Crash) as reached, suppress(Crash):
        run(task)
    return reached()


def test_crash_at_each_system_call_leaves_the_whole_checkpoint_or_none(tmp_path: Path) -> None:
    outcomes: set[RecoverOutcome] = set()

    def attempt(number: int) -> bool:
        run_dir = tmp_path / str(number)
        save(run_dir, OLD, step=1, fsync=False)
        reached = crashes(run_dir, number, make_task(run_dir, NEW, step=2, num_parts=2))
        # A reader of this moment sees the old one, or the new one whole.
        for info in list_checkpoints(run_dir)[0]:
            assert verify_checkpoint(info.path).ok
        found = recover(str(run_dir))
        outcomes.update(f.outcome for f in found)
        states = states_of(run_dir)
        assert same(states.pop(1), OLD)
        assert not states or same(states[2], NEW)
        if found:  # else it crashed before the partial directory was made, or after it was renamed
            assert bool(states) == (found[0].outcome is RecoverOutcome.COMMITTED)
        assert recover(str(run_dir)) == []
        shutil.rmtree(run_dir)
        return reached

    assert in_turn(attempt) > 40
    assert outcomes == {RecoverOutcome.COMMITTED, RecoverOutcome.REMOVED}


def test_crash_at_each_system_call_of_a_replacement_leaves_one_of_the_two(tmp_path: Path, exchange: None) -> None:
    seen = set()

    def attempt(number: int) -> bool:
        run_dir = tmp_path / str(number)
        save(run_dir, OLD, fsync=False)
        reached = crashes(run_dir, number, make_task(run_dir, NEW))
        recover(str(run_dir))
        states = states_of(run_dir)
        assert len(states) == 1
        assert same(states[1], OLD) or same(states[1], NEW)
        seen.add(len(states[1]))
        assert os.listdir(run_dir) == ["step-00000001"]
        shutil.rmtree(run_dir)
        return reached

    assert in_turn(attempt) > 40
    assert seen == {1, 3}


def test_crash_at_each_system_call_of_a_recovery_can_be_recovered_from(tmp_path: Path, exchange: None) -> None:
    def attempt(number: int) -> bool:
        run_dir = tmp_path / str(number)
        save(run_dir, OLD, fsync=False)
        stop_before_publishing(run_dir, fsync=False)
        with failing_call(number, Crash) as reached, suppress(Crash):
            recover(str(run_dir))
        recover(str(run_dir))
        assert same(states_of(run_dir)[1], NEW)
        assert os.listdir(run_dir) == ["step-00000001"]
        shutil.rmtree(run_dir)
        return reached()

    assert in_turn(attempt) > 15


def stop_before_publishing(run_dir: Path, **options: Any) -> WriteTask:
    """Every receipt is there, the commit is not."""
    task = make_task(run_dir, NEW, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.commit.persist.try_commit", lambda *_: None)
        for part in range(task.spec.num_parts):
            persist_part(task, part)
    return task


def stop_before_renaming(run_dir: Path, **options: Any) -> WriteTask:
    """The manifest is there, the name is not."""
    task = make_task(run_dir, NEW, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.storage.posix.file_system.rename_over", _crash)
        with pytest.raises(Crash):
            run(task)
    return task


def _crash(*_: object) -> None:
    raise Crash


@pytest.mark.parametrize("stop", [stop_before_publishing, stop_before_renaming])
def test_moved_run_is_recovered_where_it_is_now(run_dir: Path, tmp_path: Path, stop: Any) -> None:
    run_dir.mkdir()
    stop(run_dir)
    moved = run_dir.rename(tmp_path / "moved")
    (found,) = recover(str(moved))
    assert found.outcome is RecoverOutcome.COMMITTED
    assert same(states_of(moved)[1], NEW)


def test_missing_part_is_named(run_dir: Path) -> None:
    run_dir.mkdir()
    persist_part(make_task(run_dir, num_parts=3), 0)
    (found,) = recover(str(run_dir))
    assert found.outcome is RecoverOutcome.REMOVED and found.reason.endswith("never finished: 2 of 3 parts are missing")
    assert os.listdir(run_dir) == []


@pytest.mark.parametrize("stop", [stop_before_publishing, stop_before_renaming])
def test_older_save_of_a_step_does_not_replace_the_newer_one(run_dir: Path, stop: Any) -> None:
    run_dir.mkdir()
    stop(run_dir)
    save(run_dir, OLD)
    (found,) = recover(str(run_dir))
    assert found.outcome is RecoverOutcome.REMOVED and "is older than" in found.reason
    assert same(states_of(run_dir)[1], OLD)


def test_what_was_being_replaced_comes_back_when_its_successor_is_damaged(run_dir: Path) -> None:
    """No renameat2; killed between the two renames; and then a bit of the new one flips."""
    old = Path(save(run_dir, OLD).path)
    partial = Path(partial_path(stop_before_renaming(run_dir).spec))
    old.rename(f"{partial}.replaced")
    path = partial / "__0_0.distcp"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert [found.outcome for found in recover(str(run_dir))] == [RecoverOutcome.REMOVED, RecoverOutcome.COMMITTED]
    assert same(states_of(run_dir)[1], OLD)


def test_clock_that_was_set_back_does_not_bring_an_old_checkpoint_back(run_dir: Path) -> None:
    """Killed after the exchange of names: the old one lies under the partial name, and its date is the later one."""
    old = make_task(run_dir, OLD)
    run_dir.mkdir()
    old = replace(old, spec=replace(old.spec, created=old.spec.created + 1e6))
    new = Path(partial_path(stop_before_renaming(run_dir).spec))
    run(old)
    assert files.exchange(str(new), str(run_dir / "step-00000001"))
    (found,) = recover(str(run_dir))
    assert found.outcome is RecoverOutcome.REMOVED and "took its place" in found.reason
    assert same(states_of(run_dir)[1], NEW)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_objects.distcp", ".metadata"])
@pytest.mark.parametrize("harm", ["missing", "truncated"])
@pytest.mark.parametrize("stop", [stop_before_publishing, stop_before_renaming])
def test_files_lost_in_a_power_failure_are_not_committed(run_dir: Path, stop: Any, name: str, harm: str) -> None:
    old = save(run_dir, OLD)
    path = Path(partial_path(stop(run_dir).spec), name)
    if path.exists():
        path.unlink() if harm == "missing" else path.write_bytes(path.read_bytes()[:-1])
    found = recover(str(run_dir))
    if name == ".metadata" and stop is stop_before_publishing:  # it is written at commit
        assert found[0].outcome is RecoverOutcome.COMMITTED
        return
    assert found[0].outcome is RecoverOutcome.REMOVED and name in found[0].reason
    assert read_checkpoint(str(run_dir), 1)[0] == old


def test_without_fsync_the_bytes_are_checked_before_they_are_trusted(run_dir: Path) -> None:
    run_dir.mkdir()
    partial = Path(partial_path(stop_before_publishing(run_dir, fsync=False).spec))
    path = partial / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))  # what a power failure makes of a file that was never synced
    (found,) = recover(str(run_dir))
    assert found.outcome is RecoverOutcome.REMOVED and "damaged" in found.reason


def change_record(partial: Path, section: str, **changes: object) -> None:
    body = unseal((partial / "save-0.json").read_bytes(), "")
    body[section] = {**body[section], **changes}
    (partial / "save-0.json").write_bytes(seal(body))


_LAYOUTS: list[dict[str, object]] = [
    {"files": [["../../escape", 896], ["b", 64]]},
    {"files": []},
    {"rows": "no"},
    {"segment_bytes": 0},
    {"segment_bytes": 1},
    {"structure": 7},
    {"object_file": "../o"},
]
_FACTS: list[dict[str, object]] = [
    {"num_parts": 10**12},
    {"num_parts": 0},
    {"num_parts": "2"},
    {"num_parts": 3},
    {"kind": "other"},
    {"step": 2},
    {"save_id": "00"},
    {"fsync": "yes"},
    {"created": "now"},
    {"num_ranks": 1 << 23},
    {"num_ranks": 10**12},
    {"num_ranks": 0},
    {"rank": 1},
    {"rank": -1, "num_ranks": 2},
    {"unknown": 1},
]


@pytest.mark.parametrize(
    "section, changes", [*(("plan", c) for c in _LAYOUTS), *(("facts", c) for c in _FACTS)], ids=str
)
def test_hostile_record_is_removed(run_dir: Path, tmp_path: Path, section: str, changes: dict[str, object]) -> None:
    run_dir.mkdir()
    change_record(Path(partial_path(stop_before_publishing(run_dir).spec)), section, **changes)
    (found,) = recover(str(run_dir))
    assert found.outcome is RecoverOutcome.REMOVED
    assert os.listdir(run_dir) == [] and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", ["save-0.json", "receipt-0-0-of-2.json", "receipt-0-1-of-2.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, seal({}), seal([]), seal(None)])
def test_damaged_documents_are_removed(run_dir: Path, name: str, content: bytes) -> None:
    run_dir.mkdir()
    Path(partial_path(stop_before_publishing(run_dir).spec), name).write_bytes(content)
    (found,) = recover(str(run_dir))
    assert found.outcome is RecoverOutcome.REMOVED and name in found.reason
    assert os.listdir(run_dir) == []


@pytest.mark.remains
def test_what_is_called_partial_and_is_no_directory_is_removed_and_nothing_behind_a_link(
    run_dir: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save(elsewhere, OLD)
    partial = Path(partial_path(stop_before_renaming(elsewhere, step=5).spec))
    (partial / "mine").touch()
    before = sorted(elsewhere.rglob("*"))
    run_dir.mkdir()
    (run_dir / partial.name).symlink_to(partial)
    (run_dir / "step-00000006.partial-ab").touch()
    os.mkfifo(run_dir / "step-00000007.partial-ab")
    (run_dir / "step-00000008.partial-ab").symlink_to("/none")
    found = recover(str(run_dir))
    assert [(f.outcome, f.reason.rpartition(": ")[2]) for f in found] == [
        (RecoverOutcome.REMOVED, "is not a directory")
    ] * 4
    assert os.listdir(run_dir) == []
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.remains
def test_names_that_are_not_quite_ours_are_left_alone(run_dir: Path) -> None:
    names = [
        "step-00000001.partial-XY",
        "step-1.partial-ab",
        "step-000000001.partial-ab",
        "step-00000001.partial-ab.bak",
    ]
    for name in names:
        (run_dir / name).mkdir(parents=True)
    assert recover(str(run_dir)) == []
    assert sorted(os.listdir(run_dir)) == sorted(names)


def test_what_cannot_be_dealt_with_is_left_and_stands_in_nobodys_way(run_dir: Path) -> None:
    run_dir.mkdir()
    task = stop_before_publishing(run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", _eio)
        found = recover(str(run_dir))
    assert found == [RecoveredDirectory(Path(partial_path(task.spec)).name, RecoverOutcome.LEFT, found[0].reason)]
    assert "see dmesg" in found[0].reason
    assert partial_names(str(run_dir))
    assert recover(str(run_dir))[0].outcome is RecoverOutcome.COMMITTED


def _eio(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_every_save_in_flight_is_recovered_and_the_newest_of_a_step_wins(run_dir: Path) -> None:
    run_dir.mkdir()
    for step in (1, 2, 2):
        task = stop_before_publishing(run_dir, step=step)
    assert {f.outcome for f in recover(str(run_dir))} <= {RecoverOutcome.COMMITTED, RecoverOutcome.REMOVED}
    assert sorted(os.listdir(run_dir)) == ["step-00000001", "step-00000002"]
    assert read_checkpoint(str(run_dir), 2)[0].save_id == task.spec.save_id
    assert asdict(task.spec)["step"] == 2


def test_no_directory_is_nothing_to_recover(run_dir: Path) -> None:
    assert recover(str(run_dir)) == []


def give_up(run_dir: Path) -> WriteTask:
    """One of three parts was written, and what is there was set aside."""
    run_dir.mkdir()
    task = make_task(run_dir, NEW, num_parts=3)
    persist_part(task, 0)
    quarantine(str(run_dir), checkpoint_name(task.spec.step), task.spec.save_id)
    return task


def test_what_was_given_up_is_not_committed_by_a_part_that_comes_late(run_dir: Path) -> None:
    given_up = give_up(run_dir)
    for part in (1, 2):
        assert persist_part(given_up, part).committed is None
    assert list_checkpoints(run_dir)[0] == []
    quarantine(str(run_dir), checkpoint_name(given_up.spec.step), given_up.spec.save_id)  # of the rank that was late
    assert os.listdir(run_dir) == [unfinished_name(given_up.spec.final_name, given_up.spec.save_id)]


def test_what_was_given_up_can_be_taken_up_again(run_dir: Path) -> None:
    given_up = give_up(run_dir)
    before = os.listdir(run_dir)
    assert {found.outcome for found in recover(str(run_dir), dry_run=True, leave_unfinished=True)} == {
        RecoverOutcome.LEFT
    }
    assert os.listdir(run_dir) == before
    assert {found.outcome for found in recover(str(run_dir), leave_unfinished=True)} == {RecoverOutcome.LEFT}
    assert partial_names(str(run_dir)) == os.listdir(run_dir)
    for part in (1, 2):
        done = persist_part(given_up, part)
    assert done.committed is not None
    assert same(states_of(run_dir)[1], NEW)


def test_what_was_given_up_goes_where_there_are_no_replicas(run_dir: Path) -> None:
    give_up(run_dir)
    before = os.listdir(run_dir)
    (found,) = recover(str(run_dir), dry_run=True)
    assert (found.name, found.outcome, os.listdir(run_dir)) == (before[0], RecoverOutcome.REMOVED, before)
    assert recover(str(run_dir)) == [found]
    assert os.listdir(run_dir) == []


def test_what_was_given_up_is_removed_when_it_is_not_needed_any_more(run_dir: Path) -> None:
    given_up = give_up(run_dir)
    for _ in range(2):  # the second time it is gone
        discard_unfinished(str(run_dir), checkpoint_name(given_up.spec.step), given_up.spec.save_id)
        assert os.listdir(run_dir) == []
    quarantine(str(run_dir), checkpoint_name(given_up.spec.step), given_up.spec.save_id)


def test_what_is_committed_cannot_be_set_aside(run_dir: Path) -> None:
    save(run_dir, NEW)
    (info,) = list_checkpoints(run_dir)[0]
    quarantine(str(run_dir), checkpoint_name(info.step), info.save_id)
    assert same(states_of(run_dir)[1], NEW)
