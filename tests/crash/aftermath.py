"""What is left when a trainer has ended, and whether it is what has to be."""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from pathlib import Path

import torch

from stager import Checkpointer
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.maintenance.recover import RecoveredDirectory, recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix.run_lock import lock_directory
from tests.crash.trainers import ORPHAN_TIMEOUT_SECS, value_of
from tests.leaks import worker_processes


def wait_for_workers_to_end(allowed: int = 0) -> None:
    """Until no more than so many of this session are alive. They have to end within the orphan timeout."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT_SECS
    while len(workers := worker_processes()) > allowed:
        assert time.monotonic() < deadline, f"workers alive {ORPHAN_TIMEOUT_SECS:g} s after their trainer: {workers}"
        wait_for_one(workers)


def wait_for_one(pids: list[int]) -> None:
    """Until one of these processes has ended, or a second is over."""
    poll = select.poll()
    sentinels = []
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                sentinels.append(os.pidfd_open(pid))
                poll.register(sentinels[-1], select.POLLIN)
        if len(sentinels) == len(pids):
            poll.poll(1000)
    finally:
        for sentinel in sentinels:
            os.close(sentinel)


def committed_steps(run_dir: Path) -> list[int]:
    """Each of them verifies and holds its own values; and nothing else looks like a checkpoint."""
    found, skipped = list_checkpoints(run_dir)
    assert not skipped, skipped
    for info in found:
        result = verify_checkpoint(info.path)
        assert result.ok, result.problems
    with Checkpointer(run_dir, read_only=True) as reader:
        for info in found:
            loaded = reader.load(info.step)
            assert loaded is not None
            for tensor in loaded.state.values():
                assert torch.equal(tensor, torch.full_like(tensor, value_of(info.step)))
    visible = sorted(name for name in os.listdir(run_dir) if name.startswith("step-") and ".partial-" not in name)
    assert visible == [Path(info.path).name for info in found]
    return [info.step for info in found]


def recover_as_the_next_run(run_dir: Path) -> list[RecoveredDirectory]:
    """The directory is free, and what was left of a save is finished or removed; what that was.

    It waits for the lock, as a run does: a worker that was being forked when its trainer was killed is not to be told from
    the trainer by its command line yet, and has the lock.
    """
    lock_fd = lock_directory(str(run_dir), ORPHAN_TIMEOUT_SECS)
    try:
        found = list(recover(str(run_dir)))
    finally:
        os.close(lock_fd)
    assert not list(run_dir.glob("*.partial-*"))
    return found


def wait_for_shared_memory(allowed_bytes: int) -> int:
    """Until no more is in use, or the patience is over; how much is. Others may use some as well: not to be too strict."""
    deadline = time.monotonic() + ORPHAN_TIMEOUT_SECS
    while (used := shmem_bytes()) > allowed_bytes and time.monotonic() < deadline:
        os.sched_yield()
    return used


def shmem_bytes() -> int:
    """Shared memory in use on this machine, by anybody: what the workers' slabs are made of."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Shmem in /proc/meminfo")
