"""What a failed save means: ``persistence.on_save_error`` and ``tolerate_failures``, for one rank and for several."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, Event, FailedEvent, SaveState, StorageError, UnstageableError
from stager.ranks.rank_group import RankGroup
from stager.saving.destination import Destination
from stager.saving.save import Save
from stager.saving.save_errors import SaveErrors
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.errors import LeftRunningError, RankFailedError
from tests.faults import Faults
from tests.ranks.threads import on_ranks

STATE = {"x": torch.ones(10)}


def config(**persistence: Any) -> dict[str, Any]:
    return {"workers": {"count": 1}, "persistence": {"fsync": False, **persistence}}


def fail(ckpt: Checkpointer, faults: Faults, step: int) -> None:
    """Have a save fail in a worker, and read nothing of it."""
    faults.arm("part.write", "errno EIO")
    save = ckpt.save(step, STATE)._save
    ended = threading.Event()
    save.upload_completion.add_done_callback(lambda _: ended.set())
    ended.wait()
    assert save.state is SaveState.FAILED


def test_warn_logs_and_goes_on_and_close_raises_nothing(
    run_dir: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(run_dir, config(on_save_error="warn")) as ckpt:
        for step in range(3):
            fail(ckpt, faults, step)
        assert ckpt.save(3, STATE).upload_completion.result().step == 3
        fail(ckpt, faults, 4)
    for number, step in enumerate((0, 1, 2), 1):
        assert f"save of step {step} failed ({number} in a row), and training goes on: StorageError" in caplog.text
    assert "save of step 4 failed (1 in a row)" in caplog.text
    assert [info.step for info in Checkpointer(run_dir, read_only=True).checkpoints()] == [3]


def test_warn_returns_the_handle_of_a_save_that_failed_at_once(run_dir: Path) -> None:
    with Checkpointer(run_dir, config(on_save_error="warn")) as ckpt:
        handle = ckpt.save(0, {"x": threading.Lock()})
        assert handle.state is SaveState.FAILED
        with pytest.raises(UnstageableError):
            handle.upload_completion.result()
        with pytest.raises(ValueError, match="step must be"):  # nothing has failed: the call is wrong
            ckpt.save(-1, STATE)


def test_call_leaves_it_to_the_listeners_and_logs_only_if_there_is_none(
    run_dir: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Event] = []
    with Checkpointer(run_dir, config(on_save_error="call")) as ckpt:
        stop = ckpt.listen(lambda event: isinstance(event, FailedEvent) and told.append(event))
        with caplog.at_level(logging.WARNING):
            fail(ckpt, faults, 0)
            assert ckpt.save(1, STATE).upload_completion.result().step == 1
            assert "failed" not in caplog.text
            stop()
            fail(ckpt, faults, 2)
    assert "save of step 2 failed (1 in a row), and training goes on" in caplog.text


def test_raise_tolerates_so_many_failures_in_a_row(
    run_dir: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(run_dir, config(tolerate_failures=2)) as ckpt:
        fail(ckpt, faults, 0)
        fail(ckpt, faults, 1)
        assert ckpt.save(2, STATE).upload_completion.result().step == 2  # a commit: counting starts anew
        fail(ckpt, faults, 3)
        fail(ckpt, faults, 4)
        fail(ckpt, faults, 5)
        with pytest.raises(StorageError):
            ckpt.save(6, STATE)
        assert caplog.text.count("and training goes on") == 4
        assert ckpt.save(7, STATE).upload_completion.result().step == 7
        assert [info.step for info in ckpt.checkpoints()] == [2, 6, 7]


def test_raise_tolerates_an_error_of_save_itself_by_the_same_count(run_dir: Path) -> None:
    with Checkpointer(run_dir, config(tolerate_failures=1)) as ckpt:
        assert ckpt.save(0, {"x": threading.Lock()}).state is SaveState.FAILED
        with pytest.raises(UnstageableError):
            ckpt.save(1, {"x": threading.Lock()})
        ckpt.save(2, STATE)  # it was raised, and is not raised again


def test_an_error_that_somebody_has_read_is_not_raised_but_counts(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, config(tolerate_failures=1)) as ckpt:
        for step in range(2):
            faults.arm("part.write", "errno EIO")
            assert ckpt.save(step, STATE).upload_completion.exception() is not None
        ckpt.save(2, {}).upload_completion.result()


def test_an_error_that_save_itself_raises_is_not_logged_too(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(run_dir, config()) as ckpt, pytest.raises(UnstageableError):
        ckpt.save(0, {"x": threading.Lock()})
    assert "failed" not in caplog.text


# -- the rules alone, by hand ------------------------------------------------------------------------------------


class Ranks:
    """The saves of one rank, which end as the test says."""

    def __init__(self, group: RankGroup, on_error: Any = "raise", tolerated: int = 0) -> None:
        self.errors = SaveErrors(on_error, tolerated, group, lambda: True)
        self.group = group
        self.saves: list[Save] = []

    def save(self) -> bool:
        """Begin a save, as ``Checkpointer.save`` does. Whether it raised the error of an earlier one."""
        self.errors.judge()
        number = len(self.saves)
        save = Save(number, f"{number:x}", number, lambda make: None, Destination("", "", None), {})
        self.errors.begin(save)
        self.saves.append(save)
        try:
            self.errors.raise_due()
        except StorageError:
            return True
        return False

    def end(self, number: int, error: BaseException | None = None) -> None:
        save = self.saves[number]
        if error is not None:
            save.fail(error)
        else:
            for state in (SaveState.STAGING, SaveState.STAGED, SaveState.PERSISTING):
                save.move(state)
            save.commit(Committed(CheckpointInfo(number, "", 0, 0.0, "", 0, 0, "dcp"), 0.0, 0.0, 1))
        self.errors.judge()


def broken() -> StorageError:
    return StorageError(5, "broken", "/nowhere")


def test_a_failure_is_logged_once_unless_its_own_save_raises_it(caplog: pytest.LogCaptureFixture) -> None:
    """Each save fails in another thread, before or after its ``save()`` has returned or raised."""
    rank = Ranks(RankGroup())
    rank.save()
    rank.end(0, broken())
    assert "save of step 0" not in caplog.text  # it may yet be raised
    rank.errors.has_returned(rank.saves[0])
    assert caplog.text.count("save of step 0 failed") == 1
    rank.save()
    rank.errors.has_returned(rank.saves[1])
    rank.end(1, broken())
    assert caplog.text.count("save of step 1 failed") == 1
    rank.save()
    rank.end(2, broken())
    rank.errors.was_raised(rank.saves[2])
    rank.save()
    rank.errors.was_raised(rank.saves[3])
    rank.end(3, broken())
    assert "save of step 2" not in caplog.text and "save of step 3" not in caplog.text


def test_saves_are_judged_in_the_order_of_their_calls_whatever_ends_first() -> None:
    rank = Ranks(RankGroup(), tolerated=1)
    for _ in range(3):
        assert not rank.save()
    rank.end(2, broken())  # the third; it is the first in a row only if the second is committed
    rank.end(0, broken())
    assert not rank.save()
    rank.end(1)
    assert not rank.save()  # one in a row
    rank.end(3, LeftRunningError("not an error"))
    rank.end(4, broken())
    assert rank.save()


def test_all_ranks_raise_in_the_same_save_although_they_learn_of_the_failure_at_different_times() -> None:
    """Rank 0 knows before its next save. Rank 1 learns only when it has begun two more; its training thread waits for
    nobody. Rank 0 waits in its next save for what rank 1 knew, and both raise in the fourth."""
    late = threading.Event()

    def body(group: RankGroup) -> list[bool]:
        rank = Ranks(group)
        raised = [rank.save()]
        if group.rank == 0:
            rank.end(0, broken())
            late.set()
        else:
            late.wait()
            raised += [rank.save(), rank.save()]
            rank.end(0, broken())
        while len(raised) < 5:
            raised.append(rank.save())
        return raised

    assert on_ranks(2, body) == [[False, False, False, True, False]] * 2


def test_a_dead_rank_is_not_waited_for_longer_than_a_turn() -> None:
    """Rank 1 is to blame, and never says what it knew."""

    def body(group: RankGroup) -> bool:
        group.turn_secs = 0.0
        rank = Ranks(group)
        rank.save()
        if group.rank == 1:
            return True
        error = broken()
        rank.end(0, error)
        rank.errors._due[0] = type(rank.errors._due[0])(rank.saves[0], RankFailedError("rank 1 is dead", (1,)))
        rank.errors.judge()
        try:
            rank.save()
        except RankFailedError:
            return True
        return False

    assert on_ranks(2, body) == [True, True]


def test_a_failure_behind_a_save_that_is_left_to_the_workers_is_told_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is not judged before the one in front of it has ended."""
    rank = Ranks(RankGroup(), on_error="warn")
    rank.save()
    rank.save()
    rank.end(1, broken())
    assert "save of step 1 failed" not in caplog.text
    left = LeftRunningError("the workers finish it")
    rank.saves[0].upload_completion.was_read = True
    rank.saves[0].fail(left)
    rank.errors.raise_all()
    assert "save of step 1 failed: StorageError" in caplog.text and "the workers finish it" not in caplog.text


def test_errors_with_one_cause_are_chained_without_a_circle() -> None:
    rank, cause = Ranks(RankGroup()), ValueError("the disk")
    for number in range(3):
        rank.save()
        error = broken()
        error.__cause__ = cause
        rank.saves[number].fail(error)
    with pytest.raises(StorageError) as raised:
        rank.errors.raise_all()
    seen: set[int] = set()
    error: BaseException | None = raised.value
    while error is not None:
        assert id(error) not in seen
        seen.add(id(error))
        error = error.__cause__ or error.__context__
