"""SIGKILL, of the trainer and of any one process: what is visible afterwards is whole, what was staged is there, nobody
lives on, no memory is left, nobody hangs."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.crash.aftermath import (
    committed_steps,
    recover_as_the_next_run,
    shmem_bytes,
    wait_for_shared_memory,
    wait_for_workers_to_end,
)
from tests.crash.nursery import Nursery, Trainer
from tests.observed import workers_of

_SAVE_FOREVER = "tests.crash.trainers:save_forever"
_NBYTES = 8 << 20
_NUM_WORKERS = 2
_DEADLINE_SECS = 60.0  # for what the pool does within seconds: restarts after at most 10, heartbeats after 4


# -- right after staging --------------------------------------------------------------------------------------------


def killed_right_after_staging(nursery: Nursery, run_dir: Path, num_kills: int) -> None:
    """Each in a directory of its own, two at a time. The trainer is dead long before its worker is up: it is the worker that
    has to be waited for."""
    for step in range(num_kills):
        wait_for_workers_to_end(allowed=1)
        with nursery.start("tests.crash.trainers:save_and_die", str(run_dir / str(step)), step, _NBYTES) as trainer:
            assert trainer.wait() == -signal.SIGKILL, trainer.stderr.read_text()
    wait_for_workers_to_end()
    assert [committed_steps(run_dir / str(step)) for step in range(num_kills)] == [[step] for step in range(num_kills)]


def test_trainer_killed_right_after_staging_still_commits(run_dir: Path, nursery: Nursery) -> None:
    killed_right_after_staging(nursery, run_dir, 2)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_trainer_killed_right_after_staging_200_times(run_dir: Path, nursery: Nursery) -> None:
    before = shmem_bytes()
    killed_right_after_staging(nursery, run_dir, 200)
    after = wait_for_shared_memory(before + 8 * _NBYTES)
    print(f"200 trainers killed, 200 checkpoints; shared memory {before >> 20} MiB before, {after >> 20} MiB after")
    assert after <= before + 8 * _NBYTES


# -- at random moments ----------------------------------------------------------------------------------------------


class Run:
    """One trainer that saves for ever, and what it said.

    Attributes:
        staged, committed: the newest step of which it said so; -1: none.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.staged = self.committed = -1
        self._tail = b""

    def workers(self) -> list[int]:
        return workers_of(self.trainer.pid)

    def read(self, timeout: float) -> bool:
        """What it says within a moment; whether it goes on."""
        fd = self.trainer.stdout.fileno()
        if not select.select([fd], [], [], timeout)[0]:
            return True
        data = os.read(fd, 1 << 16)
        *lines, self._tail = (self._tail + data).split(b"\n")
        for word, *rest in (line.decode().split(maxsplit=1) for line in lines):
            assert word != "failed", rest
            if word in ("staged", "committed"):
                setattr(self, word, int(rest[0]))
        return bool(data)

    def wait_until_recovered(self) -> float:
        """After the death of a worker: until every save of that time is committed; the seconds that it took.

        No more than two are in flight, for there are two buffers. The deadline is for a hang: it is far beyond what the
        pool needs.
        """
        began = time.monotonic()
        while select.select([self.trainer.stdout], [], [], 0)[0]:
            assert self.read(0.0), "the trainer has ended by itself"
        newest = self.staged + 2
        while self.committed <= newest:
            assert self.read(1.0), "the trainer has ended by itself"
            assert time.monotonic() < began + _DEADLINE_SECS, f"nothing was committed for {_DEADLINE_SECS:g} s"
        return time.monotonic() - began

    def run_for(self, secs: float) -> None:
        """A random moment, not an order of events."""
        until = time.monotonic() + secs
        while time.monotonic() < until:
            self.read(max(0.0, until - time.monotonic()))


@contextmanager
def run_of(nursery: Nursery, run_dir: Path) -> Iterator[Run]:
    with nursery.start(_SAVE_FOREVER, str(run_dir), _NUM_WORKERS, _NBYTES) as trainer:
        run = Run(trainer)
        try:
            yield run
        finally:
            trainer.send(signal.SIGKILL)  # not reaped yet: it is still ours
            code = trainer.wait()
        while run.read(_DEADLINE_SECS):  # until nobody has its output any more
            pass
        assert code == -signal.SIGKILL, trainer.stderr.read_text()


def kill_one_at_a_time(nursery: Nursery, run_dir: Path, rng: random.Random, num_kills: int) -> dict[str, object]:
    """Any one process, again and again; a new run in the same directory whenever it was the trainer."""
    kills: Counter[str] = Counter()
    longest_secs = 0.0
    while kills.total() < num_kills:
        with run_of(nursery, run_dir) as run:
            while True:
                run.run_for(rng.uniform(0.0, 0.5))
                victim = rng.choice([run.trainer.pid, *run.workers()])
                if victim == run.trainer.pid or kills.total() + 1 >= num_kills:
                    break
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                kills["worker"] += 1
                longest_secs = max(longest_secs, run.wait_until_recovered())
        kills["trainer"] += 1
        wait_for_workers_to_end()
        check_and_prune(run_dir, run)
    return {**kills, "longest_secs": round(longest_secs, 2)}


def check_and_prune(run_dir: Path, run: Run) -> None:
    if not run_dir.exists():  # killed that early
        assert run.staged < 0
        return
    recover_as_the_next_run(run_dir)  # killed between two parts of a hand-over, it leaves a partial directory
    steps = committed_steps(run_dir)
    assert max(steps, default=-1) >= run.staged, "a staged checkpoint was lost"
    for step in steps[:-1]:
        shutil.rmtree(run_dir / f"step-{step:08d}")


def test_trainer_killed_at_random_moments(run_dir: Path, nursery: Nursery) -> None:
    """And its workers."""
    kill_one_at_a_time(nursery, run_dir, random.Random(1), 5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_any_one_process_killed_at_300_random_moments(run_dir: Path, nursery: Nursery) -> None:
    before = shmem_bytes()
    kills = kill_one_at_a_time(nursery, run_dir, random.Random(2), 300)
    after = wait_for_shared_memory(before + 8 * _NBYTES)
    print(f"{kills}; shared memory {before >> 20} MiB before, {after >> 20} MiB after")
    assert after <= before + 8 * _NBYTES
