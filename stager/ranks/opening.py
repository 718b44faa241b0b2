"""How the ranks of a group take the run's directory: rank 0 makes sure that no other run has it, then all hold it together.

1. Rank 0 takes the lock alone. It finishes or removes what an earlier run left.
2. Rank 0 shares the lock, and broadcasts ``DirectoryOpened`` with the run's nonce.
3. The other ranks wait until they see the nonce in the lock file, which shows that all see one directory. Then each of
   them takes the shared lock.
4. All come to a barrier. From then on every rank knows how many ranks share its host.

A run that starts while any rank, or any rank's workers, still hold the lock waits for all of them. A group of one keeps the
lock for itself.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from stager.ranks import keys
from stager.ranks.messages import DirectoryOpened
from stager.ranks.rank_group import RankGroup
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.run_lock import RunLock
from stager.workers.errors import ConfigError, RankFailedError, UsageError

logger = logging.getLogger("stager")

_POLL_SECS = 0.02


def take_directory(
    directory: str,
    group: RankGroup,
    lock_timeout_secs: float,
    *,
    number: int = 1,
    replicates: bool = False,
    take_over: Callable[[], None] = lambda: None,
) -> RunLock:
    """Lock the directory for this rank. Every rank calls it.

    Args:
        lock_timeout_secs: how long to wait for another run's lock.
        number: of the directory, among those that the group takes.
        take_over: called first, on every rank; raises if this process has the directory open already.
        replicates: whether partners keep replicas. Then what an earlier run left unfinished stays: replicas may complete it.

    Raises:
        ConfigError: ``replicates`` is not the same on all ranks.
        DirectoryInUseError: another run holds it.
        RankFailedError: another rank could not take it, or did not say in time that it has.
        UsageError: the ranks do not see one directory.
        StorageError
    """
    host = keys.host(socket.gethostname())
    storage = storage_of(directory)
    held: list[RunLock] = []

    def open_as_coordinator() -> DirectoryOpened:
        take_over()  # here, because the other ranks learn what is raised here
        storage.prepare(directory)
        # 1. The lock before recover(): what an earlier run left may still be written by its workers, which hold the lock.
        held.append(storage.lock(directory, lock_timeout_secs, group.nonce))
        for found in recover(directory, leave_unfinished=replicates):
            logger.warning("%s", found)
        # 2. The kernel lets go of the lock for a moment while it changes, so a group of one does not share it.
        if not group.is_alone:
            held[0].share()
        return DirectoryOpened(group.nonce, directory, replicates)

    try:
        if not group.is_coordinator:
            take_over()  # before it could wait for itself
        if number == 1:
            group.count(host)
        opened = group.broadcast(
            keys.opened(number), DirectoryOpened, open_as_coordinator, f"open {directory}", more_secs=lock_timeout_secs
        )
        if not group.is_coordinator:  # 3.
            _check_that_it_is_the_same(opened, directory, group, replicates)
            held.append(storage.lock(directory, lock_timeout_secs, group.nonce, shared=True))
        # 4. Each rank has counted itself at its host before it comes, so the count is final after the barrier.
        group.barrier(keys.opening(number), f"opening {directory}")
        group.local_size = max(group.local_size, group.count(host, 0))
    except BaseException as error:
        for lock in held:
            lock.close()
        with suppress(RankFailedError):
            group.leave_barrier(keys.opening(number), error)
        raise
    return held[0]


def _check_that_it_is_the_same(opened: DirectoryOpened, directory: str, group: RankGroup, replicates: bool) -> None:
    """On ranks other than 0: wait until this rank sees the directory that rank 0 has opened. Takes over its nonce."""
    if opened.replicates != replicates:
        raise ConfigError(
            f"replication.partners is {int(replicates)} on rank {group.rank} and {int(opened.replicates)} on rank 0; "
            "set it to the same on all ranks"
        )
    group.nonce = opened.nonce
    deadline = time.monotonic() + group.timeout_secs
    while storage_of(directory).lock_nonce(directory) != group.nonce:  # a network file system may show it later
        if time.monotonic() >= deadline:
            raise UsageError(
                f"rank {group.rank} does not see in {directory} what rank 0 wrote in {opened.directory}; all ranks must "
                "use one directory of one shared file system, or set ranks.together to false"
            )
        time.sleep(_POLL_SECS)
