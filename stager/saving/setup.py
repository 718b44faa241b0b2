"""Make the parts of a Checkpointer that saves, from its configuration and its rank group."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from stager.arena.arena import Arena
from stager.config import (
    ArenaConfig,
    PersistenceConfig,
    RetentionConfig,
    StagerConfig,
    StagingConfig,
    TelemetryConfig,
    WorkersConfig,
)
from stager.config.host import available_memory_bytes
from stager.ranks.rank_group import RankGroup
from stager.replication.replicator import NoReplication, Replicator
from stager.saving.options import SaverOptions
from stager.saving.save import Save
from stager.saving.saver import Saver
from stager.sharing.sharer import SharingOptions
from stager.snapshot.copying import Copier
from stager.snapshot.pieces import segment_bytes_for
from stager.telemetry.sinks import Telemetry
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.maintenance.retention import RetentionRules
from stager.workers.checkpoint.write.write_back import Writing
from stager.workers.errors import ConfigError
from stager.workers.pool.pool import PoolOptions, WorkerPool

logger = logging.getLogger("stager")


def check_for_ranks(config: StagerConfig, group: RankGroup) -> None:
    """Refuse settings that ranks which save together cannot have.

    Raises:
        ConfigError: names the setting, and what to set it to.
    """
    if group.is_alone:
        return
    advice = "or ranks.together to false, with a directory of its own for each rank"
    if config.persistence.format != "dcp":
        raise ConfigError(
            f"persistence.format is {config.persistence.format}, but the {group.num_ranks} ranks that save together can "
            f"write dcp only; set it to dcp, {advice}"
        )
    if config.arena.when_full == "skip":
        raise ConfigError(
            "arena.when_full is skip, but a save that one rank skips fails on all ranks that save together; set it to "
            f"wait or raise, {advice}"
        )


def make_telemetry(telemetry: TelemetryConfig, group: RankGroup) -> Telemetry:
    """Open the files for events and traces.

    Raises:
        OSError: a file cannot be opened.
    """
    return Telemetry(_of_rank(telemetry.events, group), _of_rank(telemetry.trace, group))


def _of_rank(path: str | os.PathLike[str] | None, group: RankGroup) -> str | None:
    """Name this rank's file: ``events.jsonl`` is ``events.rank-3.jsonl`` on rank 3 of several."""
    if path is None or group.is_alone:
        return None if path is None else os.fspath(path)
    stem, suffix = os.path.splitext(os.fspath(path))
    return f"{stem}.rank-{group.rank}{suffix}"


def make_arena(arena: ArenaConfig, group: RankGroup) -> Arena:
    """Make the arena, with this rank's part of the host's memory."""
    has_device = torch.cuda.is_available()
    if arena.pin is True and not has_device:
        logger.warning("arena.pin is true, but there is no CUDA device: buffers are not pinned")
    return Arena(
        arena.buffers,
        arena.resolve_max_host_bytes(available_memory_bytes(), group.local_size),
        arena.when_full,
        prefault=arena.prefault,
        pin=bool(arena.pin) and has_device,
    )


def agree_on_segment_bytes(persistence: PersistenceConfig, group: RankGroup, arena: Arena) -> int:
    """Choose one segment size for all ranks: the smallest, because a rank that saves in pieces needs small segments.

    Raises:
        RankFailedError: a rank did not answer in time.
    """
    own = persistence.segment_bytes
    if group.is_alone:
        return own
    return group.smallest("persistence.segment_bytes", segment_bytes_for(arena.piece_nbytes, own))


def start_pool(workers: WorkersConfig, group: RankGroup, lock_fd: int) -> WorkerPool:
    """Start the worker processes.

    Args:
        lock_fd: the workers keep it open, see NOTE [ The lock ] in ``workers/checkpoint/directory/run_directory.py``.

    Raises:
        WorkerStartError
    """
    options = PoolOptions(
        nice=workers.nice,
        ionice=workers.ionice,
        start_timeout_secs=workers.start_timeout_secs,
        max_restarts=workers.max_restarts,
        max_timeouts=workers.max_timeouts,
        task_timeout_secs=workers.task_timeout_secs,
        heartbeat_timeout_secs=workers.heartbeat_timeout_secs,
        orphan_timeout_secs=workers.orphan_timeout_secs,
        shutdown_timeout_secs=workers.shutdown_timeout_secs,
        env={"CUDA_VISIBLE_DEVICES": ""},  # workers never create a CUDA context
    )
    return WorkerPool(workers.resolve_count(group.local_size), options, inherit_fds=(lock_fd,))


def saver_options(config: StagerConfig, group: RankGroup, directory: str, segment_bytes: int) -> SaverOptions:
    """Work out the Saver's settings."""
    persistence = config.persistence
    num_parts = config.workers.resolve_count(group.local_size)
    return SaverOptions(
        directory=directory,
        kind=persistence.format,
        num_parts=num_parts,
        fsync=persistence.fsync,
        check_free_space=persistence.check_free_space,
        segment_bytes=segment_bytes,
        verify=config.staging.verify,
        writing=_writing(persistence, num_parts),
        incremental=persistence.incremental,
        full_every=persistence.full_every,
        safe_globals=config.loading.safe_globals,
        differing=config.ranks.differing,
    )


def _writing(persistence: PersistenceConfig, num_workers: int) -> Writing:
    if persistence.drop_page_cache and not persistence.fsync:
        logger.warning(
            "persistence.drop_page_cache is true, but persistence.fsync is false: nothing is synced or dropped"
        )
    limit = persistence.max_bytes_per_sec
    direct_io = None if persistence.direct_io == "auto" else persistence.direct_io
    return Writing(persistence.drop_page_cache, None if limit is None else limit / num_workers, direct_io)


def make_saver(
    options: SaverOptions,
    staging: StagingConfig,
    arena: Arena,
    pool: WorkerPool,
    group: RankGroup,
    on_done: Callable[[Save], None],
    replicator: Replicator | NoReplication,
) -> Saver:
    """Make the Saver."""
    sharing = SharingOptions(staging.location, staging.share_min_bytes)
    copier = Copier(staging.resolve_copy_threads(), staging.resolve_background_threads())
    return Saver(options, get_format(options.kind), arena, copier, pool, sharing, on_done, group, replicator)


def retention_rules(retention: RetentionConfig, num_threads: int | None = 1) -> RetentionRules:
    """Read the retention rules from the configuration.

    Args:
        num_threads: threads that verify. One in a worker, because it competes with the trainer; None: all cores.
    """
    return RetentionRules(
        keep_latest=retention.keep_latest,
        keep_every=retention.keep_every,
        protected=frozenset(retention.protect),
        full=retention.verify == "full",
        num_threads=num_threads,
    )
