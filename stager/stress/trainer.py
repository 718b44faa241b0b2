"""The trainer of an episode: it resumes, trains and saves as a real one does, and keeps a diary."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any

import psutil

from stager import Checkpointer, CheckpointInfo, SaveHandle
from stager.stress.diary import (
    BegunEntry,
    ClosedEntry,
    CommittedEntry,
    DetachedEntry,
    DiaryWriter,
    FailedEntry,
    FinishedEntry,
    ResumedEntry,
    SkippedEntry,
    StagedEntry,
    UpEntry,
    now,
)
from stager.stress.digest import digest
from stager.stress.episode import Episode, RunPlan
from stager.stress.training import Training
from stager.workers.errors import LeftRunningError

_ATTEMPTS = 4  # a call raises the error of each earlier save that nobody has looked at, one at a time


class DrawnError(Exception):
    """Leaves the ``with`` block where the plan says so."""


class Preempted:
    """Whether SIGTERM has come, for a trainer that saves once more and ends."""

    def __init__(self) -> None:
        self.flag = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.flag = True


class Trainer:
    """One run of an episode.

    Args:
        episode, run: what to do.
        directory: of the checkpoints.
        diary: where to write what happens.
    """

    def __init__(self, episode: Episode, run: RunPlan, directory: str, diary: DiaryWriter) -> None:
        self._episode = episode
        self._run = run
        self._directory = directory
        self._diary = diary
        self._handles: list[SaveHandle] = []
        self._noted: set[int] = set()
        self._begun_twice: set[int] = (
            set()
        )  # steps whose first save() raised an earlier error: that save goes on, unseen
        self._preempted = Preempted()

    def train(self) -> None:
        """Run to the end.

        Raises:
            DrawnError, SystemExit: if the plan says so.
        """
        self._heed_term()
        num_fds = count_fds(os.getpid())
        ckpt = Checkpointer(self._directory, self._episode.config)
        self._diary.write(UpEntry(now(), num_fds))
        if self._run.ending == "forget":
            self._train(ckpt)
            return
        with ckpt:
            self._train(ckpt)
            self._end()
            try:
                ckpt.close()
            except Exception as error:  # noqa: BLE001  (whatever a save failed with)
                self._note_error(error, None)
            self._note_lost_errors()
        self._diary.write(ClosedEntry(now(), count_fds(os.getpid())))

    def _heed_term(self) -> None:
        if self._run.on_term == "exit":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        elif self._run.on_term == "save":
            signal.signal(signal.SIGTERM, self._preempted)

    def _end(self) -> None:
        if self._run.ending == "exception":
            raise DrawnError
        if self._run.ending == "exit":
            sys.exit(0)
        if self._run.ending == "os-exit":
            os._exit(0)

    def _train(self, ckpt: Checkpointer) -> None:
        training = self._resume(ckpt)
        if self._episode.guard:
            ckpt.guard(training.optimizer)
        if self._episode.warmup:
            self._warm_up(ckpt, training)
        while training.step + 1 < self._run.until:
            training.advance()
            time.sleep(self._episode.step_secs)
            if self._episode.saves_at(training.step) or self._preempted.flag:
                self._save(ckpt, training)
            if self._preempted.flag:
                return
        self._diary.write(FinishedEntry(now(), training.step, digest(training.state)))

    def _warm_up(self, ckpt: Checkpointer, training: Training) -> None:
        try:
            ckpt.warmup(training.state)
        except Exception as error:  # noqa: BLE001  (the plan knows which ones are right)
            self._diary.write(_failed(-1, error))

    def _resume(self, ckpt: Checkpointer) -> Training:
        latest = ckpt.latest()
        skipped = tuple(skipped.name for skipped in ckpt.skipped)
        training = Training(self._episode.training, -1 if latest is None else latest.step)
        if latest is not None:
            loaded = ckpt.load(into=training.state)
            skipped += tuple(skipped.name for skipped in ckpt.skipped)
            assert loaded is not None
            training.step = loaded.step
        self._diary.write(ResumedEntry(now(), training.step, digest(training.state), skipped))
        return training

    # -- saves --------------------------------------------------------------------------------------------------

    def _save(self, ckpt: Checkpointer, training: Training) -> None:
        step = training.step
        self._diary.write(BegunEntry(now(), step, self._count_fds()))
        handle = self._try(partial(ckpt.save, step, training.state), step)
        if handle is None:
            return
        if handle.upload_completion.cancelled():
            self._diary.write(SkippedEntry(now(), step))
            return
        self._handles.append(handle)
        handle.staging_completion.add_done_callback(partial(self._note_staged, step))
        handle.upload_completion.add_done_callback(partial(self._note_done, handle))

    def _try(self, save: Callable[[], SaveHandle], step: int) -> SaveHandle | None:
        for _ in range(_ATTEMPTS):
            try:
                return save()
            except Exception as error:  # noqa: BLE001  (the plan knows which ones are right)
                if self._note_error(error, step):
                    return None
                self._begun_twice.add(step)
        return None

    def _note_error(self, error: Exception, step: int | None) -> bool:
        """Whether an error is that of the save of ``step``, and not of an earlier one."""
        told = set(map(id, _errors_in(error)))
        handles = [handle for handle in self._handles if id(_error_of(handle)) in told]
        for handle in handles:
            self._note_failure(handle)
        if handles:
            return False
        unseen = next((one for one in self._begun_twice if one != step and f"step-{one:08d}" in str(error)), None)
        if unseen is not None:
            self._begun_twice.discard(unseen)
            self._diary.write(_failed(unseen, error))
            return False
        self._diary.write(_failed(-1 if step is None else step, error))
        return True

    def _note_failure(self, handle: SaveHandle, lost: bool = False) -> None:
        error = _error_of(handle)
        if error is not None and handle.step not in self._noted:
            self._noted.add(handle.step)
            if isinstance(error, LeftRunningError):
                self._diary.write(DetachedEntry(now(), handle.step))
                return
            was_staged = handle.staging_completion.exception() is None
            self._diary.write(_failed(handle.step, error, was_staged=was_staged, lost=lost))

    def _note_lost_errors(self) -> None:
        """After ``close()``: write down the errors that no Future and no call has told."""
        for handle in self._handles:
            self._note_failure(handle, lost=True)

    def _note_staged(self, step: int, future: Future[None]) -> None:
        if future.exception() is None:
            self._diary.write(StagedEntry(now(), step))

    def _note_done(self, handle: SaveHandle, future: Future[CheckpointInfo]) -> None:
        if handle.state.value == "committed":
            self._diary.write(CommittedEntry(now(), handle.step))
        elif self._episode.reads_futures and future.exception() is not None:
            self._note_failure(handle)

    def _count_fds(self) -> dict[int, int]:
        me = psutil.Process()
        workers = {child.pid: count_fds(child.pid) for child in me.children()}
        return {me.pid: count_fds(me.pid)} | {pid: count for pid, count in workers.items() if count}


def _error_of(handle: SaveHandle) -> BaseException | None:
    """Look at a Future's error in a way that stager does not notice, so that it still has to raise it."""
    future = handle.upload_completion
    return Future.exception(future) if future.done() and not future.cancelled() else None


def _errors_in(error: BaseException) -> list[BaseException]:
    """Yield an error, the errors of its group, and its causes and contexts."""
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and one not in found:
            found.append(one)
            pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return found


def _failed(step: int, error: BaseException, *, was_staged: bool = False, lost: bool = False) -> FailedEntry:
    code = error.errno if isinstance(error, OSError) else None
    return FailedEntry(now(), step, type(error).__name__, str(error), code, was_staged, lost)


def count_fds(pid: int) -> int:
    """Number of open descriptors of a process; 0 if it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def run_trainer(arguments: dict[str, Any]) -> None:
    """The job ``trainer`` of the fork server."""
    with open(arguments["plan"], "rb") as file:
        episode = Episode.from_json(file.read())
    run = RunPlan(**arguments["run"]) if "run" in arguments else episode.runs[arguments["index"]]
    Trainer(episode, run, arguments["directory"], DiaryWriter(arguments["diary"])).train()
