"""Working out what a job needs of its hosts, and whether a host has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stager.arena.arena import Arena
from stager.config import StagerConfig
from stager.doctor.resources import FDS_PER_WORKER
from stager.planning.advice import advise
from stager.planning.footprint import Measured
from stager.planning.need import Host, JobShape, Need, Staging, Verdict
from stager.replication.keeper import capacity
from stager.replication.replicas import NUM_SLOTS
from stager.workers.errors import MemoryBudgetError

WORKER_BYTES = (
    48 << 20
)  # of one worker: 13 MiB measured, 16 MiB of buffers for direct_io, and 1 KiB for each tensor of a plan


def work_out(state: Mapping[str, Any], config: StagerConfig, job: JobShape, host: Host) -> Need:
    """Work out what saving ``state`` needs of a host of the job.

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
    has_partner = config.replication.partners > 0 and num_writers > 1 and staging.is_whole
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
    """Work out how a rank's snapshots are staged: whole, as many as fit the budget; else in pieces; else not at all."""
    slab_nbytes, buffers = measured.footprint.slab_nbytes, config.arena.buffers
    max_in_flight = min(buffers, budget_nbytes // slab_nbytes)
    if max_in_flight > 0:
        return Staging(
            num_in_flight=max_in_flight,
            num_pieces=1,
            buffer_nbytes=slab_nbytes,
            arena_nbytes=max_in_flight * slab_nbytes,
        )
    try:
        pieces = measured.in_pieces(Arena(buffers, budget_nbytes, config.arena.when_full).piece_nbytes)
    except MemoryBudgetError:
        return Staging(num_in_flight=0, num_pieces=0, buffer_nbytes=0, arena_nbytes=0)
    num_pieces = len(pieces.pieces)
    return Staging(
        num_in_flight=0,
        num_pieces=num_pieces,
        buffer_nbytes=pieces.slab_nbytes,
        arena_nbytes=min(buffers, num_pieces) * pieces.slab_nbytes,
    )


def _judge(staging: Staging, num_buffers: int, *, enough_memory: bool) -> Verdict:
    """Judge how a save goes. The worst comes first."""
    if not staging.is_possible:
        return Verdict.TOO_LARGE
    if not enough_memory:
        return Verdict.NO_MEMORY
    if not staging.is_whole:
        return Verdict.PIECES
    return Verdict.FITS if staging.num_in_flight == num_buffers else Verdict.FEWER
