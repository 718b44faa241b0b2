"""What a job needs of its hosts."""

from __future__ import annotations

from dataclasses import dataclass

from stager.planning.footprint import Footprint
from stager.planning.verdict import Verdict


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
