"""Every setting, by component: name, type, unit, default.

``configs/default.yaml`` says the same in YAML; a test compares them.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from stager.config.host import usable_cores
from stager.config.sizes import Allowed, Bytes, MemoryLimit, parse_share
from stager.workers.checkpoint.documents.names import DEFAULT_TEMPLATE, check_template
from stager.workers.checkpoint.storage.paths import local_path

Count = Literal["auto"] | Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), Allowed("a number of seconds")]
Switch = Literal["auto"] | bool
Verification = Literal["full", "quick"]
Rule = Annotated[int, Field(ge=1)] | None
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False), Allowed("a number of seconds")]


_best_form = Allowed('a mapping such as {metric: loss, mode: "min" or "max", count: 3}')


def _expanded(value: Any) -> Any:
    """A path as people write it (``~``, ``$VAR``); a relative one stays relative. What is no path is refused later."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    text = os.fsdecode(value)
    path = local_path(text, "the path")
    return path if text[0] in "~$" or "$" in text or "://" in text else text


FilePath = Annotated[str, Field(min_length=1), BeforeValidator(_expanded), Allowed("the path of a file")]


class Section(BaseModel):
    """One section of the configuration. Frozen; unknown keys and values of another type are errors.

    Strict: pydantic would otherwise take ``true`` for 1, ``"2"`` for 2 and ``1`` for true, and hide a mistake.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def setting(default: Any, description: str, **bounds: int) -> Any:
    """One key of a section; ``description`` is its line in ``docs/configuration.md``."""
    return Field(default, description=description, **bounds)  # type: ignore[call-overload]  # as many bounds as it takes


class WorkersConfig(Section):
    """The pool of worker processes of one trainer process."""

    count: Count = setting("auto", "Worker processes; auto: 2 below 8 cores, else cores / 4, at most 4.")
    nice: int = setting(10, "Niceness: 0 competes with the trainer, 19 yields the most.", ge=0, le=19)
    ionice: Literal["none", "low", "idle"] = setting("low", "I/O priority; none: as the trainer's.")
    start_timeout_secs: Seconds = setting(120.0, "Seconds for a worker to become ready.")
    max_restarts: int = setting(8, "Workers replaced before a save fails with WorkerDiedError.", ge=0)
    max_timeouts: int = setting(3, "Tries of a task that each miss task_timeout_secs before its save fails.", ge=1)
    task_timeout_secs: Seconds = setting(1800.0, "Seconds for one task; then its worker is killed.")
    heartbeat_timeout_secs: Seconds = setting(
        30.0, "Seconds within which a busy worker that is stopped or stuck is killed."
    )
    orphan_timeout_secs: Seconds = setting(600.0, "Seconds a worker outlives a dead trainer, at most.")
    shutdown_timeout_secs: Seconds = setting(10.0, "Seconds for an idle worker to exit before a signal.")

    def resolve_count(self, local_world_size: int = 1, cores: int | None = None) -> int:
        """Return how many worker processes this trainer has.

        Args:
            local_world_size: trainers on this host, which share its cores.
            cores: cores of the host that may be used; None: measure them.
        """
        if self.count != "auto":
            return self.count
        cores = usable_cores() if cores is None else cores
        on_host = 2 if cores < 8 else min(4, cores // 4)
        return max(1, on_host // max(1, local_world_size))


class ArenaConfig(Section):
    """The shared host memory that snapshots are staged into."""

    buffers: int = setting(2, "Snapshots that may be in flight at once.", ge=2)
    max_host_bytes: MemoryLimit = setting("75%", "Most memory for all buffers: bytes, or a share.")
    when_full: Literal["wait", "skip", "raise"] = setting("wait", "What save() does with no free buffer.")
    prefault: bool = setting(True, "Allocate a buffer's pages ahead, off the training path.")
    pin: Switch = setting("auto", "Page-lock buffers for the accelerator; auto: if there is one that can.")

    def resolve_max_host_bytes(self, available_bytes: int, local_world_size: int = 1) -> int:
        """Return the memory budget of this trainer, in bytes. Trainers on one host divide a share, not a number of bytes."""
        if isinstance(self.max_host_bytes, int):
            return self.max_host_bytes
        share = parse_share(self.max_host_bytes)
        assert share is not None  # validated
        return int(share * available_bytes / max(1, local_world_size))


class StagingConfig(Section):
    """The copy from the state to the snapshot."""

    location: Literal["auto", "trainer", "workers"] = setting(
        "auto", "Who copies large CPU tensors; workers: after a move into shared memory."
    )
    share_min_bytes: Annotated[Bytes, Field(ge=64 << 10)] = setting(
        1 << 20, "Smaller storages are never moved into shared memory: each takes a descriptor."
    )
    verify: bool = setting(False, "Compare the snapshot with the source, byte for byte.")
    copy_threads: Count = setting("auto", "Threads that copy while save() waits; auto: the usable cores, at most 8.")
    background_threads: Count = setting(
        "auto", "Threads that copy what is guarded, niced; auto: half of copy_threads, at most 4."
    )

    def resolve_copy_threads(self) -> int:
        """Return how many threads copy while the trainer waits; more than 8 gain nothing: memory is the limit."""
        return min(8, usable_cores()) if self.copy_threads == "auto" else self.copy_threads

    def resolve_background_threads(self) -> int:
        """Return how many threads copy while the trainer goes on."""
        if self.background_threads == "auto":
            return max(1, min(4, self.resolve_copy_threads() // 2))
        return self.background_threads


class PersistenceConfig(Section):
    """From the snapshot to the disk."""

    format: Literal["dcp", "torch", "safetensors"] = setting(
        "dcp", "Files that dcp.load, torch.load or safetensors' load_file reads."
    )
    name: Annotated[str, AfterValidator(check_template)] = setting(
        DEFAULT_TEMPLATE,
        "Name of a checkpoint's directory: {step}, or {step:08d}. Others that are there are read, too.",
    )
    fsync: bool = setting(True, "Sync before commit, so that a commit survives a power loss.")
    segment_bytes: Annotated[Bytes, Field(ge=64 << 10)] = setting(
        64 << 20, "Bytes that one hash covers at most, and that one worker writes at a time."
    )
    direct_io: Switch = setting("auto", "Write past the page cache (O_DIRECT); auto: large parts, on ext4 and XFS.")
    drop_page_cache: bool = setting(False, "Take what was synced out of the page cache.")
    max_bytes_per_sec: Annotated[Bytes, Field(ge=1 << 20)] | None = setting(
        None, "Bytes per second that all workers write together, at most; null: no limit."
    )
    check_free_space: bool = setting(True, "Refuse a save that the file system has no room for.")
    lock_timeout_secs: SecondsOrZero = setting(60.0, "Seconds to wait for another run to let go.")
    incremental: bool = setting(
        False, "Link files whose bytes did not change since the last checkpoint; not with format torch. See the guide."
    )
    on_save_error: Literal["raise", "warn", "call"] = setting(
        "raise", "A failed save: a later save() raises; or it is logged; or only the listeners get it. See the guide."
    )
    tolerate_failures: int = setting(0, "With raise: so many failures in a row are only logged.", ge=0)
    full_every: int = setting(16, "With incremental: one of so many saves in a row is written without links.", ge=2)

    @model_validator(mode="after")
    def _incremental_needs_files(self) -> PersistenceConfig:
        if self.incremental and self.format == "torch":
            raise ValueError(
                'incremental saves reuse unchanged files, and format "torch" writes one single file, which always changes; '
                "set format to dcp or safetensors, or incremental to false"
            )
        return self


class KeepBestConfig(Section):
    """Which metric makes a checkpoint one that stays."""

    metric: Annotated[str, Field(min_length=1)] = Field(description="Its name in ``save(..., metrics={...})``.")
    mode: Literal["min", "max"] = setting("min", "min: the lowest is the best; max: the highest.")
    count: int = setting(1, "So many stay.", ge=1)


class RetentionConfig(Section):
    """Which checkpoints are removed after a commit."""

    keep_latest: Rule = setting(None, "So many of the newest stay; null: no such rule. Without any rule all stay.")
    keep_every: Rule = setting(None, "Steps that are multiples of it stay; null: no such rule.")
    keep_every_secs: Seconds | None = setting(
        None, "The first checkpoint of each so many seconds stays; null: no such rule."
    )
    keep_best: Annotated[KeepBestConfig, _best_form] | None = setting(
        None,
        "The best by a metric stay, such as `{metric: loss, mode: min, count: 3}`; null: no such rule. "
        "Removes nothing until a checkpoint has the metric.",
    )
    protect: list[Annotated[int, Field(ge=0)]] = setting(
        [], "Steps that stay whatever the rules say, as those given to `protect()`."
    )
    verify: Verification = setting(
        "full", "What the newest must pass before others go. full: every hash; quick: sizes."
    )

    @property
    def has_rules(self) -> bool:
        """Whether anything is removed."""
        return any((self.keep_latest, self.keep_every, self.keep_every_secs, self.keep_best))


class LoadingConfig(Section):
    """From the disk back into the state."""

    verify: Verification = setting(
        "full", "What latest() looks at. full: the hash of every byte; quick: names and sizes only."
    )
    verify_first: bool = setting(
        False, "Before load(into=...) changes anything, hash all of it; false: hash while reading, which is once."
    )
    threads: Count = setting("auto", "Threads that read; auto: the cores the trainer may use.")
    allow_pickle: bool = setting(False, "Unpickle any object: runs code from the checkpoint.")
    safe_globals: list[str] = setting(
        [], "Classes that checkpoints may hold, as package.module.Class, beside plain data."
    )


class RanksConfig(Section):
    """Several ranks of a job that make one checkpoint."""

    together: Switch = setting("auto", "One checkpoint of all ranks; auto: if torch.distributed is initialized.")
    timeout_secs: Seconds = setting(600.0, "Seconds that a rank waits for the others before a save fails.")
    differing: Literal["error", "warn"] = setting(
        "error", "Tensors that are not sharded and differ between ranks: fail the save, or warn."
    )


class ReplicationConfig(Section):
    """Snapshots that another rank keeps in memory, too, for when the disk does not have them."""

    partners: int = setting(0, "Ranks that keep each rank's newest snapshots in memory: 0 or 1.", ge=0, le=1)
    directory: FilePath = setting(
        "/dev/shm", "Where they keep them: files in memory, twice the size of a rank's share of a checkpoint."
    )


class TelemetryConfig(Section):
    """What each save leaves for people and tools to look at."""

    events: FilePath | None = setting(None, "Events appended here as JSON lines; null: none.")
    trace: FilePath | None = setting(None, "A Chrome trace written here on close; null: none.")
    progress: bool = setting(False, "Show progress while something waits for saves, on a terminal or in a notebook.")
    listen_timeout_secs: SecondsOrZero = setting(
        10.0, "Seconds that close() waits for listeners to take the last events."
    )


class StagerConfig(Section):
    """The whole configuration. Subclass it to add sections, and pass the subclass to ``load_config(model=...)``."""

    workers: WorkersConfig = setting(WorkersConfig(), "The pool of worker processes.")
    arena: ArenaConfig = setting(ArenaConfig(), "Shared memory for snapshots.")
    staging: StagingConfig = setting(StagingConfig(), "From the state to the snapshot.")
    persistence: PersistenceConfig = setting(PersistenceConfig(), "From there to the disk.")
    retention: RetentionConfig = setting(RetentionConfig(), "Which checkpoints stay on the disk.")
    loading: LoadingConfig = setting(LoadingConfig(), "From the disk to the state.")
    ranks: RanksConfig = setting(RanksConfig(), "Ranks that save together.")
    replication: ReplicationConfig = setting(ReplicationConfig(), "A second copy, in memory.")
    telemetry: TelemetryConfig = setting(TelemetryConfig(), "Events and traces.")
