"""What a Checkpointer has of replication: it opens it after its pool, and closes it after its saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch.distributed as dist

from stager.config import ReplicationConfig
from stager.ranks import keys
from stager.ranks.rank_group import RankGroup
from stager.replication.replica_restorer import ReplicaRestorer
from stager.replication.replicas import Replicas
from stager.replication.replicator import NoReplication, Replicator
from stager.workers.checkpoint.directory.run_directory import committed_steps
from stager.workers.errors import ConfigError, RankFailedError, StorageError
from stager.workers.memory.descriptor import Descriptor
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_LAST_SECS = 5.0  # for snapshots on their way to partners, in a run that has failed


@dataclass(frozen=True, slots=True)
class Replication:
    """A rank's replicator, and the way back from replicas.

    Attributes:
        directory: of the run, absolute.
        replicator: sends snapshots to the partner.
        restore: restores a damaged step from replicas; see :class:`~stager.loading.joint_loader.JointLoader`.
    """

    directory: str
    replicator: Replicator | NoReplication
    restore: Callable[[int], bool] = lambda damaged: False

    @staticmethod
    def open(
        config: ReplicationConfig, directory: str, group: RankGroup, pool: WorkerPool, lock: Descriptor
    ) -> Replication:
        """Restore what an earlier run left in memory, and begin. Every rank calls it, before anything is saved.

        Args:
            lock: on the directory.

        Raises:
            ConfigError, StorageError: replicas cannot be kept.
            RankFailedError: a rank did not come.
        """
        if not config.partners:
            return Replication(directory, NoReplication())
        replicas = Replicas(config.directory, directory)
        try:
            if not dist.is_gloo_available():
                raise ConfigError(  # noqa: TRY301  # the other ranks are told of it, too
                    "replication.partners is 1, which needs the gloo backend, and this torch is built without it; set it "
                    "to 0, or install a torch that has gloo"
                )
            replicas.create()
        except BaseException as error:
            with suppress(RankFailedError):  # the others wait there for this rank
                group.leave_barrier(keys.restore(1), error)
            raise
        if group.is_alone:
            logger.warning(
                "replication.partners is %d, but this process saves alone (there is no process group of several ranks, or "
                "ranks.together is false), so no other process keeps a copy; start several ranks, call "
                "init_process_group() before the Checkpointer is made, or set replication.partners to 0",
                config.partners,
            )
        restorer = ReplicaRestorer(group, directory, replicas, pool, lock)
        whole_id = restorer.open()
        if group.is_alone:
            replicas.tidy()
            return Replication(directory, NoReplication())
        replicator = Replicator(group, replicas, whole_id)

        def restore(damaged: int) -> bool:
            with replicator.holding_still():
                return restorer.restore(damaged)

        return Replication(directory, replicator, restore)

    @contextmanager
    def closing(self, limits: Sequence[float | None], *, has_failed: bool) -> Iterator[None]:
        """Close around the end of the saves, then remove the replicas of what is committed.

        A run that failed or is interrupted will be started again: its replicas stay in memory.

        Args:
            limits: seconds for snapshots on their way to partners; the shortest counts, None is no limit.
            has_failed: whether the run has.
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
            limits = [*limits, last_secs if has_failed else None]
            self.replicator.close(min(limit for limit in limits if limit is not None))
        if self.replicator.is_on and not has_failed:
            with suppress(StorageError):
                newest = max(committed_steps(self.directory), default=None)
                if newest is not None:
                    self.replicator.remove(newest)
