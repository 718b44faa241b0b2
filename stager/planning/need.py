"""What a job needs of its hosts, and whether one host has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stager.arena.arena import Arena
from stager.config import StagerConfig
from stager.doctor.resources import FDS_PER_WORKER
from stager.planning.advice import advise
from stager.planning.footprint import Footprint, Measured
from stager.planning.verdict import Verdict
from stager.replication.keeper import capacity
from stager.replication.replicas import NUM_SLOTS
from stager.workers.errors import MemoryBudgetError

WORKER_BYTES = 48 << 20  # of its own: 13 MiB measured, buffers of 16 for direct_io, and 1 KiB for each tensor of a plan


@dataclass(frozen=True)
class Job:
    """Attributes:
    num_ranks: trainer processes of the whole job.
    local_world_size: of them on one host.
    num_shards: over how many of them each tensor is spread; the others have copies, of which each writes a part
        (``ranks.together``).
    """

    num_ranks: int = 1
    local_world_size: int = 1
    num_shards: int = 1


@dataclass(frozen=True)
class Host:
    """Attributes:
    available_bytes: memory that can be taken, of the host or the cgroup.
    num_cores: that may be used.
    max_open_files: of one process; None is unlimited.
    """

    available_bytes: int
    num_cores: int
    max_open_files: int | None


@dataclass(frozen=True)
class Staging:
    """How the snapshots of one rank go through its buffers. Bytes.

    Attributes:
        num_in_flight: whole snapshots that fit the budget together, at most ``arena.buffers``.
        num_pieces: that a snapshot is staged in: 1, or more if none fits as a whole; 0 if no piece fits either.
        buffer_nbytes: of one buffer: a whole snapshot's, or a piece's.
        arena_nbytes: of all buffers.
    """

    num_in_flight: int
    num_pieces: int
    buffer_nbytes: int
    arena_nbytes: int


@dataclass(frozen=True)
class Need:
    """Bytes, unless the name says something else.

    Attributes:
        state: what one checkpoint of the whole job holds.
        rank: what one rank stages; the same as ``state`` when it is not sharded.
        num_buffers: snapshots that are to be in flight: ``arena.buffers``.
        wanted_arena_nbytes: what it takes for each of them to have a whole buffer.
        budget_nbytes: ``arena.max_host_bytes`` of a rank.
        staging: what comes of it within that budget.
        num_workers: processes of a rank.
        worker_nbytes: of them together, at most.
        replica_nbytes: what a rank keeps of its partner's snapshots, in ``replication.directory``.
        host_nbytes: of all ranks on one host: buffers, workers, replicas.
        num_descriptors: of one rank, about.
        advice: what to change, if anything.
    """

    job: Job
    host: Host
    verdict: Verdict
    state: Footprint
    rank: Footprint
    num_buffers: int
    wanted_arena_nbytes: int
    budget_nbytes: int
    staging: Staging
    num_workers: int
    worker_nbytes: int
    replica_nbytes: int
    host_nbytes: int
    num_descriptors: int
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.verdict is Verdict.FITS


def work_out(state: Mapping[str, Any], config: StagerConfig, job: Job, host: Host) -> Need:
    """
    Raises:
        UnstageableError: a value cannot be saved; names its key path.
    """
    num_workers = config.workers.resolve_count(job.local_world_size, host.num_cores)
    whole = Measured(state, config, num_workers)
    num_writers = job.num_shards if config.ranks.together is False else job.num_ranks
    mine = whole if num_writers == 1 else Measured(state, config, num_workers, num_writers)
    budget = config.arena.resolve_max_host_bytes(host.available_bytes, job.local_world_size)
    staging = _stage(mine, budget, config)
    worker_nbytes = num_workers * WORKER_BYTES
    has_partner = config.replication.partners > 0 and num_writers > 1 and staging.num_in_flight > 0
    replica_nbytes = NUM_SLOTS * capacity(mine.footprint.slab_nbytes) if has_partner else 0
    host_nbytes = job.local_world_size * (staging.arena_nbytes + worker_nbytes + replica_nbytes)
    need = Need(
        job=job,
        host=host,
        verdict=_judge(staging, config.arena.buffers, enough_memory=host_nbytes <= host.available_bytes),
        state=whole.footprint,
        rank=mine.footprint,
        num_buffers=config.arena.buffers,
        wanted_arena_nbytes=config.arena.buffers * mine.footprint.slab_nbytes,
        budget_nbytes=budget,
        staging=staging,
        num_workers=num_workers,
        worker_nbytes=worker_nbytes,
        replica_nbytes=replica_nbytes,
        host_nbytes=host_nbytes,
        num_descriptors=FDS_PER_WORKER * num_workers + 4 * config.arena.buffers,
    )
    return replace(need, advice=advise(need, config))


def _stage(measured: Measured, budget_nbytes: int, config: StagerConfig) -> Staging:
    slab_nbytes, buffers = measured.footprint.slab_nbytes, config.arena.buffers
    in_flight = min(buffers, budget_nbytes // slab_nbytes)
    if in_flight:
        return Staging(in_flight, 1, slab_nbytes, in_flight * slab_nbytes)
    try:
        pieces = measured.in_pieces(Arena(buffers, budget_nbytes, config.arena.when_full).piece_nbytes)
    except MemoryBudgetError:
        return Staging(0, 0, 0, 0)
    num_pieces = len(pieces.pieces)
    return Staging(0, num_pieces, pieces.slab_nbytes, min(buffers, num_pieces) * pieces.slab_nbytes)


def _judge(staging: Staging, buffers: int, enough_memory: bool) -> Verdict:
    if staging.num_pieces == 0:
        return Verdict.TOO_LARGE
    if not enough_memory:
        return Verdict.NO_MEMORY
    if staging.num_in_flight == 0:
        return Verdict.PIECES
    return Verdict.FITS if staging.num_in_flight == buffers else Verdict.FEWER
