"""The command can say no: hangs and leftovers are planted in real runs, lies in the diaries of made-up ones."""

from __future__ import annotations

import mmap
import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from stager.stress import system
from stager.stress.checker import Found
from stager.stress.config import StressConfig, StressSettings
from stager.stress.diary import (
    BegunEntry,
    ClosedEntry,
    CommittedEntry,
    DetachedEntry,
    Diary,
    Entry,
    FailedEntry,
    FinishedEntry,
    ResumedEntry,
    StagedEntry,
    UpEntry,
)
from stager.stress.episode import RunPlan
from stager.stress.fault_kinds import FullDisk, PointFault, Pressure, SignalFault
from stager.stress.inflictor import Fired
from stager.stress.judge import violations_of
from stager.stress.record import FaultResult, RunRecord
from stager.stress.run import Stage
from stager.stress.system import Traces
from tests.stress.plans import episode

PLAN = episode(RunPlan(3))
DIGESTS = ["zero", "one", "two"]


def test_process_that_outlives_its_trainer_is_found_and_killed(stage: Stage) -> None:
    hog = Pressure(save=1, nbytes=1 << 20, secs=600.0)
    settings = StressConfig(stress=StressSettings(gone_deadline_secs=0.5))
    result = stage.play(episode(RunPlan(2, faults=(hog,)), number=1), settings)
    assert [line for line in result.violations if "was alive" in line] == result.violations != []
    assert result.outcomes[0].outcome is FaultResult.VIOLATION
    assert not stage.server.alive()
    assert (Path(result.directory) / "left.txt").read_text().startswith("pid ")


@pytest.mark.long
def test_run_that_hangs_is_ended_and_its_stacks_are_kept(stage: Stage) -> None:
    stopped = SignalFault("trainer", "SIGSTOP", save=1, delay_secs=0.0, pause_secs=600.0)
    settings = StressConfig(stress=StressSettings(run_deadline_secs=3.0))
    result = stage.play(episode(RunPlan(50, faults=(stopped,)), number=2, step_secs=0.05), settings)
    assert any("the trainer hung" in line for line in result.violations)
    assert not stage.server.alive()
    assert "thread" in (Path(result.directory) / "hang.txt").read_text()
    assert "Fatal Python error: Aborted" in (Path(result.directory) / "run-0.log").read_text()  # and its stack


def test_shared_memory_and_names_that_are_left_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before = replace(Traces.take(os.getpid()), shmem_bytes=0)  # others may give theirs back at any moment
    left = Path("/dev/shm", f"left-{uuid.uuid4().hex}x")  # no part of the name is a number: it would be its owner's pid
    try:
        with open(left, "xb"), mmap.mmap(-1, 32 << 20) as memory:
            memory.write(bytes(32 << 20))
            monkeypatch.setattr(system, "_PATIENCE_SECS", 0.0)
            monkeypatch.setattr(system, "others_with_shared_memory", lambda _: [])  # whoever runs beside this test
            problems = before.left_behind(os.getpid(), 8 << 20)
    finally:
        left.unlink()
    assert any(line.endswith("bytes more of shared memory than before the episode") for line in problems)
    assert f"{left} was left behind" in problems
    assert any("the fork server had" in line for line in problems)  # its descriptor of the file


def test_shared_memory_of_others_is_seen() -> None:
    with mmap.mmap(-1, 32 << 20) as memory:
        memory.write(bytes(32 << 20))
        assert os.getpid() in system.others_with_shared_memory(())
    assert os.getpid() not in system.others_with_shared_memory((os.getpid(),))


# -- made-up diaries --------------------------------------------------------------------------------------------------


def diary_of(*entries: Entry) -> Diary:
    diary = Diary("/nowhere")
    diary.entries = list(entries)
    return diary


GOOD = (
    UpEntry(1.0, 5),
    ResumedEntry(1.1, 0, "zero"),
    BegunEntry(2.0, 1, {}),
    StagedEntry(2.1, 1),
    BegunEntry(3.0, 2, {}),
    StagedEntry(3.1, 2),
    CommittedEntry(3.2, 1),
    CommittedEntry(3.3, 2),
    FinishedEntry(3.4, 2, "two"),
    ClosedEntry(4.0, 5),
)
BEFORE = Found(valid=(0,))
FOUND = Found(valid=(0, 1, 2))
NOT_WHOLE = "step 1 is committed and invalid"


def good_run() -> RunRecord:
    return RunRecord(PLAN.runs[0], diary_of(*GOOD), BEFORE, exitcode=0, ended=4.0, found=FOUND)


def said(run: RunRecord) -> list[str]:
    return list(violations_of(run, PLAN, DIGESTS))


def without(*kinds: type) -> tuple[Entry, ...]:
    return tuple(entry for entry in GOOD if not isinstance(entry, kinds))


def test_good_run_is_good() -> None:
    assert said(good_run()) == []


def failed(step: int, error: str = "StorageError", errno: int | None = 5) -> FailedEntry:
    return FailedEntry(3.0, step, error, "message", errno, True)


def told() -> RunRecord:
    """To go, while it waited for its saves."""
    run = replace(good_run(), diary=diary_of(*without(CommittedEntry), DetachedEntry(3.5, 1), DetachedEntry(3.5, 2)))
    run.fired.append(Fired(SignalFault("trainer", "SIGTERM", save=1, delay_secs=0.0), 3.4, "trainer"))
    return run


def test_saves_that_are_left_to_the_workers_by_a_trainer_told_to_go_are_good() -> None:
    assert said(told()) == []


LIES: list[tuple[str, RunRecord]] = [
    ("the trainer hung", replace(good_run(), exitcode=None)),
    ("the trainer ended with 1", replace(good_run(), exitcode=1)),
    ("the trainer ended with -9", replace(good_run(), exitcode=-9)),
    ("was alive", replace(good_run(), left=["process 7 (sleeping)"])),
    ("resumed from step 0, although step 1", replace(good_run(), before=Found(valid=(0, 1)))),
    ("loaded as another state", replace(good_run(), diary=diary_of(UpEntry(1.0, 5), ResumedEntry(1.1, 0, "lie")))),
    ("with another state", replace(good_run(), diary=diary_of(*without(FinishedEntry), FinishedEntry(3.4, 2, "lie")))),
    ("save of step 2 failed", replace(good_run(), diary=diary_of(*GOOD, failed(2)))),
    ("step 2 was reported as committed", replace(good_run(), found=Found(valid=(0, 1), missing=(2,)))),
    (
        "step 2 was staged and did not fail",
        replace(good_run(), diary=diary_of(*without(CommittedEntry)), found=Found(valid=(0, 1), missing=(2,))),
    ),
    ("neither committed nor failed", replace(good_run(), diary=diary_of(*without(CommittedEntry)))),
    (
        "nobody told the trainer to go",
        replace(good_run(), diary=diary_of(*without(CommittedEntry, ClosedEntry), DetachedEntry(3.5, 1))),
    ),
    (
        "step 2 was staged and did not fail",
        replace(
            told(),
            diary=diary_of(*without(CommittedEntry), DetachedEntry(3.5, 2)),
            found=Found(valid=(0, 1), missing=(2,)),
        ),
    ),
    ("which an earlier run had committed", replace(good_run(), found=Found(valid=(1, 2), missing=(0,)))),
    ("descriptors open before", replace(good_run(), diary=diary_of(*without(ClosedEntry), ClosedEntry(4.0, 6)))),
    (
        "descriptors after a third",
        replace(good_run(), diary=diary_of(*(BegunEntry(1.0 + i, 1, {9: 5 + 3 * i}) for i in range(12)))),
    ),
    (
        "did not clean it up",
        replace(good_run(), before=replace(BEFORE, partials=("p",)), found=replace(FOUND, partials=("p",))),
    ),
    ("neither a call nor close() raised", replace(good_run(), diary=diary_of(*GOOD, replace(failed(2), lost=True)))),
    ("while it ran: torn", replace(good_run(), peeks=["while it ran: torn"])),
    (
        "step 1 is committed and invalid",
        replace(good_run(), found=replace(FOUND, problems=("step 1 is committed and invalid",))),
    ),
]


@pytest.mark.parametrize(("expected", "run"), LIES, ids=[lie for lie, _ in LIES])
def test_each_lie_is_found(expected: str, run: RunRecord) -> None:
    assert any(expected in line for line in said(run)), said(run)


def test_error_at_a_point_excuses_one_save_with_that_error_and_no_other() -> None:
    fired = Fired(PointFault("part.write", "errno", detail="EIO"), 2.5, "worker")
    run = replace(good_run(), fired=[fired])
    assert said(replace(run, diary=diary_of(*without(CommittedEntry), CommittedEntry(3.2, 1), failed(2)))) == []
    assert said(replace(run, diary=diary_of(*GOOD, failed(1), failed(2)))) != []
    assert said(replace(run, diary=diary_of(*GOOD, failed(2, errno=28)))) != []


def test_full_disk_excuses_what_was_begun_before_it_was_over() -> None:
    run = replace(good_run(), fired=[Fired(FullDisk(1, 0, 1.0), 2.5, "disk", over=2.9)])
    assert said(replace(run, diary=diary_of(*GOOD, failed(1, errno=28)))) == []
    assert said(replace(run, diary=diary_of(*GOOD, failed(2, errno=28)))) != []  # begun after it


def test_loss_is_excused_only_if_the_worker_was_killed_with_the_trainer() -> None:
    dead = replace(
        good_run(),
        diary=diary_of(*without(CommittedEntry, FinishedEntry, ClosedEntry)),
        found=Found(valid=(0, 1), missing=(2,)),
    )
    trainer = Fired(SignalFault("trainer", "SIGKILL", 1, 0.0), 10.0, "trainer")
    worker = SignalFault("worker", "SIGKILL", 1, 0.0)
    dead = replace(dead, exitcode=-9, ended=10.0)
    assert said(replace(dead, fired=[trainer])) != []
    assert said(replace(dead, fired=[Fired(worker, 5.0, "worker"), trainer])) != []
    assert said(replace(dead, fired=[trainer, Fired(worker, 10.2, "worker")])) == []
