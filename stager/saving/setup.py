"""Make the parts of a Checkpointer that saves, from its configuration and its rank group."""

from __future__ import annotations

import logging
import os

import torch

from stager.arena.arena import Arena
from stager.config import ArenaConfig, PersistenceConfig, RetentionConfig, StagerConfig, TelemetryConfig, WorkersConfig
from stager.config.host import available_memory_bytes
from stager.ranks.rank_group import RankGroup
from stager.snapshot.pieces import segment_bytes_for
from stager.telemetry.listeners import Listeners
from stager.telemetry.sinks import chrome_trace, json_lines
from stager.workers._version import __version__
from stager.workers.checkpoint.maintenance.retention_rules import KeepBest, RetentionRules
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.writing import Writing
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.device.accelerator import NO_DEVICE_ENVIRONMENT
from stager.workers.device.host_memory import can_register
from stager.workers.errors import ConfigError
from stager.workers.pool.pool import PoolOptions, WorkerPool

logger = logging.getLogger("stager")


def check_for_ranks(config: StagerConfig, group: RankGroup) -> None:
    """Refuse settings that ranks which save together cannot have, with a ConfigError that says what to set."""
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


def check_for_storage(config: StagerConfig, directory: str) -> None:
    """Refuse settings that the storage of ``directory`` cannot have, with a ConfigError that says what to set."""
    guarantees = storage_of(directory).guarantees
    if config.persistence.incremental and not guarantees.links:
        raise ConfigError(
            f"persistence.incremental is true, but {directory} is in an object store, which has no hard links; set it to "
            "false"
        )
    if config.replication.partners and not guarantees.quarantine:
        raise ConfigError(
            f"replication.partners is {config.replication.partners}, but {directory} is in an object store, where replicas "
            "cannot complete a save; set it to 0"
        )


def listen_to_files(listeners: Listeners, telemetry: TelemetryConfig, group: RankGroup) -> None:
    """Let the configured files listen. Of several ranks, rank 3 has ``x.rank-3.jsonl``.

    Raises:
        ConfigError: one of them cannot be opened.
    """
    rank = "" if group.is_alone else f".rank-{group.rank}"
    files = (("events", telemetry.events, json_lines), ("trace", telemetry.trace, chrome_trace))
    for key, path, open_sink in files:
        if path is not None:
            name = os.path.abspath(rank.join(os.path.splitext(path)))
            directory = os.path.dirname(name)
            try:
                sink = open_sink(name)
            except OSError as error:
                missing = (
                    "" if os.path.isdir(directory) else f"; create the directory {directory}, or name another file"
                )
                raise ConfigError(f"telemetry.{key}: {name} cannot be written: {error.strerror}{missing}") from error
            listeners.add(sink, sink.close)


def make_arena(arena: ArenaConfig, group: RankGroup) -> Arena:
    """Make the arena, with this rank's part of the host's memory."""
    can_pin = can_register()
    if arena.pin is True and not can_pin:
        logger.warning(
            "arena.pin is true, but there is no accelerator that can register host memory: buffers are not pinned"
        )
    return Arena(
        arena.buffers,
        arena.resolve_max_host_bytes(available_memory_bytes(), group.local_size),
        arena.when_full,
        prefault=arena.prefault,
        pin=bool(arena.pin) and can_pin,
    )


def agree_on_segment_bytes(persistence: PersistenceConfig, group: RankGroup, arena: Arena) -> int:
    """Choose one segment size for all ranks: the smallest, because a rank that saves in pieces needs small segments."""
    own = persistence.segment_bytes
    if group.is_alone:
        return own
    return group.smallest("persistence.segment_bytes", segment_bytes_for(arena.piece_nbytes, own))


def start_pool(workers: WorkersConfig, local_size: int) -> WorkerPool:
    """Start the worker processes. ``local_size`` trainers on this host share its cores."""
    settings = workers.model_dump(exclude={"count"})
    options = PoolOptions(**settings, env=NO_DEVICE_ENVIRONMENT)  # workers never create a context
    return WorkerPool(workers.resolve_count(local_size), options)


def start_export_pool(workers: WorkersConfig) -> WorkerPool:
    """Start the one worker that exports weights. A large model may take it longer than any write of a save."""
    settings = workers.model_dump(exclude={"count", "task_timeout_secs"})
    return WorkerPool(1, PoolOptions(**settings, env=NO_DEVICE_ENVIRONMENT))


def save_template(persistence: PersistenceConfig, group: RankGroup) -> SaveSpec:
    """Return what the specs of all saves have in common; each save fills in the rest."""
    return SaveSpec(
        directory="",
        step=0,
        save_id="",
        kind=persistence.format,
        num_parts=0,
        fsync=persistence.fsync,
        created=0.0,
        stager=__version__,
        torch=str(torch.__version__),  # of a class of torch's, which a worker would have to import
        full_every=persistence.full_every,
        rank=group.rank,
        num_ranks=group.num_ranks,
    )


def writing(persistence: PersistenceConfig, num_workers: int) -> Writing:
    """Return how one of the workers writes."""
    if persistence.drop_page_cache and not persistence.fsync:
        logger.warning(
            "persistence.drop_page_cache is true, but persistence.fsync is false: nothing is synced or dropped"
        )
    limit = persistence.max_bytes_per_sec
    direct_io = None if persistence.direct_io == "auto" else persistence.direct_io
    return Writing(persistence.drop_page_cache, None if limit is None else limit / num_workers, direct_io)


def retention_rules(retention: RetentionConfig, num_threads: int | None = 1) -> RetentionRules:
    """Read the retention rules. One thread verifies in a worker, which competes with the trainer; None: all cores."""
    return RetentionRules(
        keep_latest=retention.keep_latest,
        keep_every=retention.keep_every,
        protected=frozenset(retention.protect),
        full=retention.verify == "full",
        num_threads=num_threads,
        keep_best=None if retention.keep_best is None else KeepBest(**retention.keep_best.model_dump()),
        keep_every_secs=retention.keep_every_secs,
    )
