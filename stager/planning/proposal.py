"""Choosing settings for a host, a directory and, if it is known, a state: each with the reason for its value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stager.config import StagerConfig
from stager.config.sizes import format_bytes
from stager.planning.need import Host, JobShape, Need, Verdict
from stager.planning.place import Place
from stager.workers.checkpoint.storage.places import is_url

_DIRECT_IO_FSTYPES = ("ext4", "xfs")  # as persistence.direct_io: auto decides
_IN_MEMORY_FSTYPES = ("tmpfs", "ramfs")
_GROWTH = 1.25  # the state may grow by a quarter before a snapshot has to be staged in pieces
_MANY_CHECKPOINTS = 20  # so many fit the disk: nothing has to be removed soon
_MIB = 1 << 20


@dataclass(frozen=True)
class Choice:
    """One setting, and why it has this value. ``value`` is as YAML would give it."""

    section: str
    key: str
    value: Any
    reason: str


def propose(host: Host, job: JobShape, place: Place, need: Need | None) -> list[Choice]:
    """Choose the settings that depend on these facts, or that people change most.

    Args:
        need: what saving the state takes with the defaults; None if the state is not known.
    """
    return [
        *_workers(host, job),
        *_arena(host, job, need),
        *_persistence(job, place),
        _keep_latest(place, need),
        *_others(job),
    ]


def _workers(host: Host, job: JobShape) -> Iterator[Choice]:
    count = StagerConfig().workers.resolve_count(job.local_world_size, host.num_cores)
    trainers = f"{job.local_world_size} trainers" if job.local_world_size > 1 else "one trainer"
    yield Choice("workers", "count", "auto", f"{count} for each trainer: {host.num_cores} cores, {trainers} on a host")
    if host.num_cores == 1:
        yield Choice("workers", "nice", 19, "trainer and workers share one core: training goes first")
    else:
        yield Choice("workers", "nice", 10, "training goes first where cores are short; 0 to 19")


def _arena(host: Host, job: JobShape, need: Need | None) -> Iterator[Choice]:
    buffers = StagerConfig().arena.buffers
    size = f", {format_bytes(need.rank.slab_nbytes)} each" if need else ""
    yield Choice("arena", "buffers", buffers, f"one is written while the next save fills the other{size}")
    yield _max_host_bytes(host, job, need)
    yield Choice("arena", "when_full", "wait", "wait: no checkpoint is left out, and training may wait for the disk")


def _max_host_bytes(host: Host, job: JobShape, need: Need | None) -> Choice:
    config = StagerConfig().arena
    budget = config.resolve_max_host_bytes(host.available_bytes, job.local_world_size)
    if need is not None and need.verdict is Verdict.FITS:
        wanted = -(-int(need.wanted_arena_nbytes * _GROWTH) // _MIB)  # rounded up
        if wanted * _MIB <= budget:
            reason = f"{config.buffers} snapshots of this state, and a quarter more for a state that grows"
            return Choice("arena", "max_host_bytes", f"{wanted}MiB", f"{reason}; for each trainer")
    share = config.max_host_bytes
    reason = f"{share} of what is available when the job starts: now {format_bytes(budget)} for each trainer"
    return Choice("arena", "max_host_bytes", share, f"{reason}, or states of {format_bytes(budget // config.buffers)}")


def _persistence(job: JobShape, place: Place) -> Iterator[Choice]:
    kept = " (the only format for several ranks)" if job.num_ranks > 1 else ""
    yield Choice("persistence", "format", "dcp", f"dcp.load reads it, on any number of ranks{kept}")
    if is_url(place.path):
        yield Choice("persistence", "fsync", True, "means nothing in an object store: what it has taken is durable")
        yield Choice("persistence", "direct_io", "auto", "means nothing in an object store: no file is written")
        yield Choice("persistence", "incremental", False, "true is refused: an object store has no hard links")
        return
    disk = f"{place.path} is on {place.fstype or 'an unknown file system'}"
    in_memory = place.fstype in _IN_MEMORY_FSTYPES
    durable = "which is in memory and does not survive a reboot" if in_memory else "and a commit survives a power loss"
    yield Choice("persistence", "fsync", True, f"{disk}, {durable}")
    direct = "past the page cache" if place.fstype in _DIRECT_IO_FSTYPES else "through the page cache"
    yield Choice("persistence", "direct_io", "auto", f"{disk}: large parts are written {direct}")
    yield Choice("persistence", "incremental", False, "true pays where most of the state is frozen (LoRA)")


def _keep_latest(place: Place, need: Need | None) -> Choice:
    if is_url(place.path):
        return Choice(
            "retention", "keep_latest", None, "all are kept, and an object store is paid by size; set a number"
        )
    key, free = ("retention", "keep_latest"), format_bytes(place.free_bytes)
    if need is None:
        return Choice(*key, None, f"{free} are free; set a number before that is used up")
    fits = place.free_bytes // need.state.disk_nbytes
    size = f"{free} are free, and a checkpoint takes {format_bytes(need.state.disk_nbytes)}"
    if fits >= _MANY_CHECKPOINTS:
        return Choice(*key, None, f"{size}: {fits} fit. Set a number before they do not")
    return Choice(*key, max(2, fits // 2), f"{size}: {fits} fit, and one is written before another is removed")


def _others(job: JobShape) -> Iterator[Choice]:
    yield Choice("loading", "verify", "full", "latest() reads every byte; quick: only names and sizes")
    if job.num_ranks > 1:
        yield Choice("ranks", "together", "auto", f"{job.num_ranks} ranks make one checkpoint, in one shared directory")
        yield Choice("ranks", "timeout_secs", 600.0, "longer than the slowest rank may be behind the first one")
