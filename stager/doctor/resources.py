"""Checks of cores, memory and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stager.config import StagerConfig
from stager.config.sizes import format_bytes
from stager.doctor.finding import Finding, Status

FDS_PER_WORKER = 8  # its socket and pidfd, and what multiprocessing holds for it, rounded up
FDS_OF_A_TRAINER = 128  # what else the process has open: Python, torch, a data loader, logs
_SMALL_BUDGET_BYTES = 1 << 30  # with less for its buffers, a trainer can stage hardly any model whole
_FDS_PER_BUFFER = 4
_SPARE_FDS = 1024
THREADS_PER_PROCESS = 32  # torch starts a pool of threads in each process that computes


@dataclass(frozen=True)
class CoreFacts:
    """The cores of the host.

    Attributes:
        online: cores of the host.
        affinity: cores this process may run on.
        quota: the cgroup's CPU quota in cores; None without one.
        local_world_size: trainers on this host.
    """

    online: int
    affinity: int
    quota: float | None
    local_world_size: int = 1

    @property
    def usable(self) -> int:
        """Number of cores that this process may use."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, math.ceil(self.quota)))


def check_cores(facts: CoreFacts, config: StagerConfig) -> Finding:
    """Judge whether workers and trainers have enough cores."""
    limits = [] if facts.affinity == facts.online else [f"affinity {facts.affinity}"]
    limits += [] if facts.quota is None else [f"cgroup quota {facts.quota:g}"]
    value = f"{facts.usable} of {facts.online}" + (f" ({', '.join(limits)})" if limits else "")
    num_workers = config.workers.resolve_count(facts.local_world_size, facts.usable)
    meaning = f"{num_workers} worker processes for each trainer, at nice {config.workers.nice}"
    if facts.local_world_size > 1:
        meaning += f"; {facts.local_world_size} trainers share this host"
    if facts.usable == 1:
        advice = "give the job a second core; or raise workers.nice to 19 so that training goes first"
        return Finding("cores", value, Status.WARN, f"{meaning}; workers and trainer take turns on one core", advice)
    return Finding("cores", value, Status.OK, meaning)


@dataclass(frozen=True)
class MemoryFacts:
    """The memory of the host.

    Attributes:
        total, available: of the host, bytes, as psutil says.
        cgroup_limit: bytes; None without one.
        cgroup_headroom: what the cgroup still has to give, bytes; None without a limit.
        local_world_size: trainers on this host.
    """

    total: int
    available: int
    cgroup_limit: int | None
    cgroup_headroom: int | None
    local_world_size: int = 1

    @property
    def usable(self) -> int:
        """Bytes that this process may still take."""
        return self.available if self.cgroup_headroom is None else min(self.available, self.cgroup_headroom)


def check_memory(facts: MemoryFacts, config: StagerConfig) -> Finding:
    """Judge whether the buffers of all trainers on the host fit into its memory."""
    value = f"{format_bytes(facts.usable)} available of {format_bytes(facts.total)}"
    if facts.cgroup_limit is not None:
        value += f" (cgroup limit {format_bytes(facts.cgroup_limit)})"
    num_trainers = max(1, facts.local_world_size)
    budget = config.arena.resolve_max_host_bytes(facts.usable, num_trainers)  # of one trainer
    buffers = config.arena.buffers
    meaning = (
        f"arena.max_host_bytes {config.arena.max_host_bytes} allows {format_bytes(budget)} for {buffers} buffers: "
        f"states of up to {format_bytes(budget // buffers)} for each trainer"
    )
    if num_trainers > 1:
        meaning += f"; {num_trainers} trainers share this host"
    if budget * num_trainers > facts.usable:
        return Finding(
            "memory",
            value,
            Status.WARN,
            f"{meaning}; together that is more than is available, so the out-of-memory killer may come before a clear error",
            f"set arena.max_host_bytes to at most {format_bytes(facts.usable // num_trainers)}, or to a share such as 75%",
        )
    if budget < _SMALL_BUDGET_BYTES:
        is_number = isinstance(config.arena.max_host_bytes, int)
        advice = "raise arena.max_host_bytes" if is_number else "give the job more memory, or raise the cgroup's limit"
        return Finding("memory", value, Status.WARN, meaning, advice)
    return Finding("memory", value, Status.OK, meaning)


def check_dev_shm(total_bytes: int | None, free_bytes: int = 0) -> Finding:
    """Tell what /dev/shm is used for.

    Args:
        total_bytes: size of ``/dev/shm``; None when it is not mounted.
        free_bytes: what is free of it.
    """
    value = "not mounted" if total_bytes is None else f"{format_bytes(free_bytes)} free of {format_bytes(total_bytes)}"
    meaning = "used for replicas only (replication.partners): buffers are memfd mappings, which its size does not limit"
    if total_bytes is not None and total_bytes < 1 << 30:
        meaning += "; torch's DataLoader workers do use it, and this is small for them"
    return Finding("/dev/shm", value, Status.OK, meaning)


def check_open_files(soft: int | None, hard: int | None, config: StagerConfig, num_workers: int) -> Finding:
    """Judge whether the limit of open files is high enough.

    Args:
        soft, hard: ``RLIMIT_NOFILE``; None is unlimited.
        num_workers: of one trainer.
    """
    need = FDS_PER_WORKER * num_workers + _FDS_PER_BUFFER * config.arena.buffers
    meaning = f"stager itself takes about {need}: some for each worker and buffer, none for each tensor"
    if soft is not None and soft < need + FDS_OF_A_TRAINER:
        status = Status.FAIL if soft < need else Status.WARN
        advice = f"ulimit -n {need + _SPARE_FDS}" + (f" (the hard limit is {hard})" if hard is not None else "")
        return Finding("open files", _limit(soft), status, f"{meaning}; little is left for the trainer", advice)
    return Finding("open files", _limit(soft), Status.OK, meaning)


def check_locked_memory(soft_bytes: int | None, registers: bool) -> Finding:
    """Tell whether buffers are page-locked.

    Args:
        soft_bytes: ``RLIMIT_MEMLOCK``; None is unlimited.
        registers: whether there is an accelerator whose driver would page-lock buffers.
    """
    value = "unlimited" if soft_bytes is None else format_bytes(soft_bytes)
    if not registers:
        return Finding("locked memory", value, Status.OK, "not needed: no accelerator has buffers page-locked")
    meaning = (
        "buffers are page-locked by the accelerator's driver; should that fail, they stay pageable, with a warning"
    )
    return Finding("locked memory", value, Status.OK, meaning)


@dataclass(frozen=True)
class ProcessFacts:
    """The limits of processes and threads.

    Attributes:
        soft_limit: ``RLIMIT_NPROC``, in threads of this user; None is unlimited.
        cgroup_limit, cgroup_used: the pids controller's, in threads; None without one.
        is_root: root is not bound by ``RLIMIT_NPROC``.
    """

    soft_limit: int | None
    cgroup_limit: int | None
    cgroup_used: int | None
    is_root: bool = False


def check_processes(facts: ProcessFacts, num_workers: int) -> Finding:
    """Judge whether the workers can be started."""
    need = num_workers * THREADS_PER_PROCESS
    user_limit = None if facts.is_root else facts.soft_limit
    value = f"{_limit(facts.soft_limit)} for the user" + (" (not for root)" if facts.is_root else "")
    room = user_limit
    if facts.cgroup_limit is not None:
        value += f", {facts.cgroup_used or 0} of {facts.cgroup_limit} used in the cgroup"
        cgroup_room = facts.cgroup_limit - (facts.cgroup_used or 0)
        room = cgroup_room if room is None else min(room, cgroup_room)
    meaning = f"{num_workers} workers, each a process with a few threads"
    if room is not None and room < need:
        advice = "raise ulimit -u, or the container's pids limit"
        return Finding("processes", value, Status.WARN, f"{meaning}; starting them may fail with EAGAIN", advice)
    return Finding("processes", value, Status.OK, meaning)


def _limit(value: int | None) -> str:
    return "unlimited" if value is None else str(value)
