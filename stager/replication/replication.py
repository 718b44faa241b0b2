"""What a Checkpointer has of replication: it opens it after its pool, and closes it after its saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from stager.config import ReplicationConfig
from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.replication.replicas import Replicas
from stager.replication.replicator import Replicator
from stager.replication.restorer import Restorer, meeting
from stager.workers.checkpoint.directory.run_directory import committed_steps
from stager.workers.errors import ConfigError, RankFailedError, StorageError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_dist: Any = dist  # not all of it is annotated
_LAST_SECS = 5.0  # for snapshots on their way to partners, in a run that has failed


class Replication:
    """
    Args:
        directory: of the run, absolute.
        replicator: None: there is no partner.
        restore: see :class:`~stager.loading.joint_loader.LoadTogether`.
    """

    def __init__(
        self, directory: str, replicator: Replicator | None = None, restore: Callable[[int], bool] | None = None
    ) -> None:
        self._directory = directory
        self.replicator = replicator
        self.restore = restore

    @staticmethod
    def open(config: ReplicationConfig, directory: str, group: RankGroup, pool: WorkerPool) -> Replication:
        """Restore what an earlier run left in memory, and begin. Every rank calls it, before anything is saved.

        Raises:
            ConfigError, StorageError: replicas cannot be kept.
            RankFailedError: a rank did not come.
        """
        if not config.partners:
            return Replication(directory)
        replicas = Replicas(config.directory, directory)
        try:
            _check_gloo()
            replicas.create()
        except BaseException as error:
            with suppress(RankFailedError):
                group.cancel_barrier(
                    meeting(1), f"failed on rank {group.rank}: {type(error).__name__}: {error}", [group.rank]
                )
            raise
        if group.rendezvous is None:
            _restore_alone(config, directory, group, replicas, pool)
            return Replication(directory)
        restorer = Restorer(group, directory, replicas, pool)
        replicator = Replicator(group, replicas, restorer.open())

        def restore(damaged: int) -> bool:
            with replicator.holding_still():
                return restorer.restore(damaged)

        return Replication(directory, replicator, restore)

    @contextmanager
    def closing(self, limits: Sequence[float | None], *, has_failed: bool) -> Iterator[None]:
        """Around the end of the saves. What is committed then need not stay in memory, unless the run has failed, or is
        interrupted, and is begun again.

        Args:
            limits: seconds for snapshots on their way to partners.
        """
        last_secs = _LAST_SECS
        try:
            yield
        except BaseException as error:
            has_failed = True
            if not isinstance(error, Exception):  # an interrupt is not to be followed by another wait
                last_secs = 0.0
            raise
        finally:
            if self.replicator is not None:
                limits = [*limits, last_secs if has_failed else None]
                self.replicator.close(min(limit for limit in limits if limit is not None))
        if self.replicator is None or has_failed:
            return
        with suppress(StorageError):
            newest = max(committed_steps(self._directory), default=None)
            if newest is not None:
                self.replicator.remove(newest)


def _check_gloo() -> None:
    if not dist.is_gloo_available():
        raise ConfigError("replication.partners is 1, and this torch has no gloo, which takes snapshots to partners")


def _restore_alone(
    config: ReplicationConfig, directory: str, group: RankGroup, replicas: Replicas, pool: WorkerPool
) -> None:
    """What several ranks left is one process's to restore, too."""
    logger.warning(
        "replication.partners is %d, but this process saves for itself: it has no partner that could keep a copy",
        config.partners,
    )
    alone = replace(group, rendezvous=Rendezvous(_dist.HashStore(), "replicas", num_ranks=1))
    try:
        Restorer(alone, directory, replicas, pool).open()
    finally:
        alone.close()
    replicas.tidy()
