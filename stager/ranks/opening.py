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
import os
import socket
import time
from contextlib import suppress

from stager.ranks import keys
from stager.ranks.messages import DirectoryOpened
from stager.ranks.rank_group import RankGroup
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.directory.run_directory import LOCK_NAME, lock_directory, share_lock
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.errors import ConfigError, RankFailedError, UsageError

logger = logging.getLogger("stager")

_POLL_SECS = 0.02


def take_directory(
    directory: str, group: RankGroup, lock_timeout_secs: float, *, leave_unfinished: bool = False
) -> int:
    """Lock the directory for this rank; returns the lock's descriptor. Every rank calls it.

    Args:
        lock_timeout_secs: how long to wait for another run's lock.
        leave_unfinished: of what an earlier run left, only finish what can be finished: replicas may complete the rest.

    Raises:
        ConfigError: the ranks' configurations do not go together.
        DirectoryInUseError: another run holds it.
        RankFailedError: another rank could not take it, or did not say in time that it has.
        UsageError: the ranks do not see one directory.
        StorageError
    """
    host = keys.host(socket.gethostname())
    held: list[int] = []
    try:
        group.count(host)
        opened = group.broadcast(
            keys.OPENED,
            DirectoryOpened,
            lambda: _lead(directory, group, lock_timeout_secs, leave_unfinished, held),
            f"open {directory}",
            more_secs=lock_timeout_secs,
        )
        if not group.is_coordinator:
            held.append(_follow(opened, directory, group, lock_timeout_secs, leave_unfinished))
        group.barrier(keys.OPENING, f"opening {directory}")
        group.local_size = max(group.local_size, group.count(host, 0))
    except BaseException as error:
        for lock_fd in held:
            os.close(lock_fd)
        with suppress(RankFailedError):
            group.leave_barrier(keys.OPENING, error)
        raise
    return held[0]


def _lead(
    directory: str, group: RankGroup, lock_timeout_secs: float, leave_unfinished: bool, held: list[int]
) -> DirectoryOpened:
    """Steps 1 and 2, on rank 0.

    Args:
        held: the lock's descriptor is added.
    """
    with storage_errors("create", directory):
        os.makedirs(directory, exist_ok=True)
    held.append(lock_directory(directory, lock_timeout_secs, group.nonce))
    for found in recover(directory, leave_unfinished=leave_unfinished):
        logger.warning("%s left by an earlier run: %s (%s)", found.name, found.outcome.value, found.reason)
    if not group.is_alone:  # the kernel lets go of the lock for a moment, so it is not done without need
        share_lock(held[0], directory)
    return DirectoryOpened(group.nonce, directory, leave_unfinished)


def _follow(
    opened: DirectoryOpened, directory: str, group: RankGroup, lock_timeout_secs: float, leave_unfinished: bool
) -> int:
    """On ranks other than 0: check that this rank sees rank 0's directory, and share its lock. Returns the descriptor."""
    if opened.replicates != leave_unfinished:
        raise ConfigError(
            f"replication.partners is {int(leave_unfinished)} on rank {group.rank} and {int(opened.replicates)} on rank 0; "
            "set it to the same on all ranks"
        )
    group.nonce = opened.nonce
    path = os.path.join(directory, LOCK_NAME)
    deadline = time.monotonic() + group.timeout_secs
    while group.nonce not in _content(path):  # a network file system may show it later
        if time.monotonic() >= deadline:
            raise UsageError(
                f"rank {group.rank} does not see in {directory} what rank 0 wrote in {opened.directory}; all ranks must "
                "use one directory of one shared file system, or set ranks.together to false"
            )
        time.sleep(_POLL_SECS)
    return lock_directory(directory, lock_timeout_secs, shared=True)


def _content(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(256)
    except OSError:  # not to be seen yet
        return ""
