"""Every setting, by component: name, type, unit, default.

``configs/default.yaml`` says the same in YAML; a test compares them.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from stager.config.host import usable_cores
from stager.config.sizes import Allowed, Bytes, MemoryLimit, parse_share

Count = Literal["auto"] | Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), Allowed("a number of seconds")]
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False), Allowed("a number of seconds")]


def _as_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


FilePath = Annotated[str, Field(min_length=1), BeforeValidator(_as_text), Allowed("the path of a file")]


class Section(BaseModel):
    """One section of the configuration. Frozen; unknown keys and values of another type are errors.

    Strict: pydantic would otherwise take ``true`` for 1, ``"2"`` for 2 and ``1`` for true, and hide a mistake.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class WorkersConfig(Section):
    """The pool of worker processes of one trainer process."""

    count: Count = Field(
        default="auto", description="Worker processes; auto: 2 below 8 cores, else cores / 4, at most 4."
    )
    nice: int = Field(default=10, ge=0, le=19, description="Niceness: 0 competes with the trainer, 19 yields the most.")
    ionice: Literal["none", "low", "idle"] = Field(default="low", description="I/O priority; none: as the trainer's.")
    start_timeout_secs: Seconds = Field(default=120.0, description="Seconds for a worker to become ready.")
    max_restarts: int = Field(default=8, ge=0, description="Workers replaced before a save fails with WorkerDiedError.")
    max_timeouts: int = Field(
        default=3, ge=1, description="Tries of a task that each miss task_timeout_secs before its save fails."
    )
    task_timeout_secs: Seconds = Field(default=1800.0, description="Seconds for one task; then its worker is killed.")
    heartbeat_timeout_secs: Seconds = Field(
        default=30.0, description="Seconds within which a busy worker that is stopped or stuck is killed."
    )
    orphan_timeout_secs: Seconds = Field(
        default=600.0, description="Seconds a worker outlives a dead trainer, at most."
    )
    shutdown_timeout_secs: Seconds = Field(
        default=10.0, description="Seconds for an idle worker to exit before a signal."
    )

    def resolve_count(self, local_world_size: int = 1, cores: int | None = None) -> int:
        """The number of worker processes of this trainer.

        Args:
            local_world_size: trainers on this host, which share its cores.
            cores: cores of the host that may be used; measured when None.

        Returns:
            ``count`` as written; for ``auto``: 2 below 8 cores, else ``min(4, cores // 4)``, divided by the local
            world size, at least 1.
        """
        if self.count != "auto":
            return self.count
        cores = usable_cores() if cores is None else cores
        on_host = 2 if cores < 8 else min(4, cores // 4)
        return max(1, on_host // max(1, local_world_size))


class ArenaConfig(Section):
    """The shared host memory that snapshots are staged into."""

    buffers: int = Field(default=2, ge=2, description="Snapshots that may be in flight at once.")
    max_host_bytes: MemoryLimit = Field(default="75%", description="Most memory for all buffers: bytes, or a share.")
    when_full: Literal["wait", "skip", "raise"] = Field(
        default="wait", description="What save() does with no free buffer."
    )
    prefault: bool = Field(default=True, description="Allocate a buffer's pages ahead, off the training path.")
    pin: Literal["auto"] | bool = Field(
        default="auto", description="Page-lock buffers for CUDA; auto: if CUDA is used."
    )

    def resolve_max_host_bytes(self, available_bytes: int, local_world_size: int = 1) -> int:
        """The memory budget of this trainer, in bytes.

        Args:
            available_bytes: what the host, or the cgroup, has to give.
            local_world_size: trainers on this host. A share is divided between them; a number of bytes is for each.
        """
        if isinstance(self.max_host_bytes, int):
            return self.max_host_bytes
        share = parse_share(self.max_host_bytes)
        assert share is not None  # validated
        return int(share * available_bytes / max(1, local_world_size))


class StagingConfig(Section):
    """The copy from the state to the snapshot."""

    location: Literal["auto", "trainer", "workers"] = Field(
        default="auto", description="Who copies large CPU tensors; workers: after a move into shared memory."
    )
    share_min_bytes: Annotated[Bytes, Field(ge=64 << 10)] = Field(
        default=1 << 20, description="Smaller storages are never moved into shared memory: each takes a descriptor."
    )
    verify: bool = Field(default=False, description="Compare the snapshot with the source, byte for byte.")
    copy_threads: Count = Field(
        default="auto", description="Threads that copy while save() waits; auto: the usable cores, at most 8."
    )
    background_threads: Count = Field(
        default="auto", description="Threads that copy what is guarded, niced; auto: half of copy_threads, at most 4."
    )

    def resolve_copy_threads(self) -> int:
        """Threads that copy while the trainer waits; more than 8 gain nothing: memory is the limit."""
        return min(8, usable_cores()) if self.copy_threads == "auto" else self.copy_threads

    def resolve_background_threads(self) -> int:
        """Threads that copy while the trainer goes on."""
        if self.background_threads == "auto":
            return max(1, min(4, self.resolve_copy_threads() // 2))
        return self.background_threads


class PersistenceConfig(Section):
    """From the snapshot to the disk."""

    format: Literal["dcp", "torch", "safetensors"] = Field(
        default="dcp", description="Files that dcp.load, torch.load or safetensors' load_file reads."
    )
    fsync: bool = Field(default=True, description="Sync before commit, so that a commit survives a power loss.")
    segment_bytes: Annotated[Bytes, Field(ge=64 << 10)] = Field(
        default=64 << 20,
        description="Bytes that one hash covers at most, and that one worker writes at a time.",
    )
    direct_io: Literal["auto"] | bool = Field(
        default="auto", description="Write past the page cache (O_DIRECT); auto: large parts, on ext4 and XFS."
    )
    drop_page_cache: bool = Field(default=False, description="Take what was synced out of the page cache.")
    max_bytes_per_sec: Annotated[Bytes, Field(ge=1 << 20)] | None = Field(
        default=None, description="Bytes per second that all workers write together, at most; null: no limit."
    )
    check_free_space: bool = Field(default=True, description="Refuse a save that the file system has no room for.")
    lock_timeout_secs: SecondsOrZero = Field(default=60.0, description="Seconds to wait for another run to let go.")
    incremental: bool = Field(
        default=False,
        description="Link files whose bytes did not change since the last checkpoint; not with format torch. See the guide.",
    )
    full_every: int = Field(
        default=16, ge=2, description="With incremental: one of so many saves in a row is written without links."
    )

    @model_validator(mode="after")
    def _incremental_needs_files(self) -> PersistenceConfig:
        if self.incremental and self.format == "torch":
            raise ValueError(
                'incremental saves link files in which nothing changed, and format "torch" has one file only, in which '
                "something always did; set format to dcp or safetensors, or incremental to false"
            )
        return self


class RetentionConfig(Section):
    """Which checkpoints are removed after a commit."""

    keep_latest: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="So many of the newest stay; null: no such rule. Without any rule all stay."
    )
    keep_every: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Steps that are multiples of it stay; null: no such rule."
    )
    protect: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], description="Steps that stay whatever the rules say, as those given to `protect()`."
    )
    verify: Literal["full", "quick"] = Field(
        default="full", description="What the newest must pass before others go. full: every hash; quick: sizes."
    )


class LoadingConfig(Section):
    """From the disk back into the state."""

    verify: Literal["full", "quick"] = Field(
        default="full", description="What latest() looks at. full: the hash of every byte; quick: names and sizes only."
    )
    verify_first: bool = Field(
        default=False,
        description="Before load(into=...) changes anything, hash all of it; false: hash while reading, which is once.",
    )
    threads: Count = Field(default="auto", description="Threads that read; auto: the cores the trainer may use.")
    allow_pickle: bool = Field(default=False, description="Unpickle any object: runs code from the checkpoint.")
    safe_globals: tuple[str, ...] = Field(
        default=(), description="Classes that checkpoints may hold, as package.module.Class, beside plain data."
    )


class RanksConfig(Section):
    """Several ranks of a job that make one checkpoint."""

    together: Literal["auto"] | bool = Field(
        default="auto", description="One checkpoint of all ranks; auto: if torch.distributed is initialized."
    )
    timeout_secs: Seconds = Field(
        default=600.0, description="Seconds that a rank waits for the others before a save fails."
    )
    differing: Literal["error", "warn"] = Field(
        default="error", description="Tensors that are not sharded and differ between ranks: fail the save, or warn."
    )


class ReplicationConfig(Section):
    """Snapshots that another rank keeps in memory, too, for when the disk does not have them."""

    partners: int = Field(
        default=0, ge=0, le=1, description="Ranks that keep each rank's newest snapshots in memory: 0 or 1."
    )
    directory: FilePath = Field(
        default="/dev/shm",
        description="Where they keep them: files in memory, twice the size of a rank's share of a checkpoint.",
    )


class TelemetryConfig(Section):
    """What each save leaves for people and tools to look at."""

    events: FilePath | None = Field(default=None, description="Events appended here as JSON lines; null: none.")
    trace: FilePath | None = Field(default=None, description="A Chrome trace written here on close; null: none.")


class StagerConfig(Section):
    """The whole configuration. Subclass it to add sections, and pass the subclass to ``load_config(model=...)``."""

    workers: WorkersConfig = Field(default=WorkersConfig(), description="The pool of worker processes.")
    arena: ArenaConfig = Field(default=ArenaConfig(), description="Shared memory for snapshots.")
    staging: StagingConfig = Field(default=StagingConfig(), description="From the state to the snapshot.")
    persistence: PersistenceConfig = Field(default=PersistenceConfig(), description="From there to the disk.")
    retention: RetentionConfig = Field(default=RetentionConfig(), description="Which checkpoints stay on the disk.")
    loading: LoadingConfig = Field(default=LoadingConfig(), description="From the disk to the state.")
    ranks: RanksConfig = Field(default=RanksConfig(), description="Ranks that save together.")
    replication: ReplicationConfig = Field(default=ReplicationConfig(), description="A second copy, in memory.")
    telemetry: TelemetryConfig = Field(default=TelemetryConfig(), description="Events and traces.")
