"""``Need``: what a job needs of its hosts, and what it was worked out from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from stager.planning.footprint import Footprint


class Verdict(str, Enum):
    """How a save of the state would go."""

    FITS = "fits"  # as configured
    FEWER = "fewer in flight"  # fewer snapshots at a time than arena.buffers
    PIECES = "in pieces"  # no whole snapshot fits the budget
    TOO_LARGE = "too large"  # not even one piece fits the budget
    NO_MEMORY = "not enough memory"  # the budget allows it, and the host does not have it


@dataclass(frozen=True)
class JobShape:
    """The ranks of a job.

    Attributes:
        num_ranks: trainer processes of the whole job.
        local_world_size: trainer processes on one host.
        num_shards: number of ranks that each tensor is sharded over. Other ranks have replicas, and each rank writes a part
            of
            what it has (``ranks.together``).
    """

    num_ranks: int = 1
    local_world_size: int = 1
    num_shards: int = 1


@dataclass(frozen=True)
class Host:
    """One host of a job.

    Attributes:
        available_bytes: memory that is available on the host, or in the cgroup.
        num_cores: cores that may be used.
        max_open_files: limit of one process; None: unlimited.
    """

    available_bytes: int
    num_cores: int
    max_open_files: int | None


@dataclass(frozen=True)
class Staging:
    """How the snapshots of one rank go through its buffers.

    Attributes:
        num_in_flight: the most snapshots that can be in flight: those that fit the budget whole, up to ``arena.buffers``.
        num_pieces: number of pieces of a snapshot: 1 if a whole one fits, 0 if not even a piece fits.
        buffer_nbytes: size of one buffer, for a whole snapshot or for a piece.
        arena_nbytes: size of all buffers.
    """

    num_in_flight: int
    num_pieces: int
    buffer_nbytes: int
    arena_nbytes: int

    @property
    def is_possible(self) -> bool:
        """Whether at least a piece of a snapshot fits the budget."""
        return self.num_pieces > 0

    @property
    def is_whole(self) -> bool:
        """Whether a whole snapshot fits the budget, so that none is staged in pieces."""
        return self.num_in_flight > 0


@dataclass(frozen=True)
class Need:
    """What a job needs.

    Attributes:
        job: the job's ranks.
        host: a host of the job.
        verdict: how a save would go.
        state: footprint of one checkpoint of the whole job.
        rank: footprint of what one rank stages; the same as ``state`` if nothing is sharded.
        num_buffers: number of snapshots to have in flight: ``arena.buffers``.
        wanted_arena_nbytes: memory of a rank in which each of these has a whole buffer.
        budget_nbytes: ``arena.max_host_bytes`` of a rank.
        staging: how snapshots are staged within that budget.
        num_workers: worker processes of a rank.
        worker_nbytes: memory of these workers, at most.
        replica_nbytes: memory of a rank for the snapshots of its partner, in ``replication.directory``.
        host_nbytes: buffers, workers and replicas of all ranks on one host.
        num_descriptors: file descriptors of one rank, about.
        advice: which settings to change, if any.
    """

    job: JobShape
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
        """Whether a save goes as configured."""
        return self.verdict is Verdict.FITS
