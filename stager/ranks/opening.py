"""How the ranks of a group take the run's directory: one makes sure that nobody else has it, then they hold it together.

    rank 0    lock, alone -> finish or remove what an earlier run left -> share the lock -> post the nonce
    others    wait for the nonce -> see it in the lock file -> share the lock
    all       wait for all: then they know how many of them share a host, too

A run that starts while any rank, or any rank's workers, still hold the lock waits for all of them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from contextlib import suppress

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
    """Lock the directory for this rank; returns the lock's descriptor.

    Args:
        leave_unfinished: of what an earlier run left, only finish what can be finished: replicas may complete the rest.

    Raises:
        ConfigError: the ranks' configurations do not go together.
        DirectoryInUseError: another run holds it.
        RankFailedError: another rank could not take it, or did not say in time that it has.
        UsageError: the ranks do not see one directory.
        StorageError
    """
    if group.rendezvous is None:
        return _lock(directory, lock_timeout_secs, leave_unfinished=leave_unfinished)
    host = f"host/{socket.gethostname()}"
    group.rendezvous.add(host)
    try:
        if group.is_coordinator:
            lock_fd = _lead(directory, group, lock_timeout_secs, leave_unfinished)
        else:
            lock_fd = _follow(directory, group, lock_timeout_secs, leave_unfinished)
    except BaseException as error:
        with suppress(RankFailedError):
            group.cancel_barrier(
                "opening", f"failed on rank {group.rank}: {type(error).__name__}: {error}", [group.rank]
            )
        raise
    try:
        group.barrier("opening", f"opening {directory}")
        group.local_size = group.rendezvous.add(host, 0)
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def _lock(directory: str, lock_timeout_secs: float, nonce: str = "", *, leave_unfinished: bool) -> int:
    with storage_errors("create", directory):
        os.makedirs(directory, exist_ok=True)
    lock_fd = lock_directory(directory, lock_timeout_secs, nonce)
    try:
        for found in recover(directory, leave_unfinished=leave_unfinished):
            logger.warning("%s left by an earlier run: %s (%s)", found.name, found.outcome.value, found.reason)
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def _lead(directory: str, group: RankGroup, lock_timeout_secs: float, leave_unfinished: bool) -> int:
    assert group.rendezvous is not None
    group.nonce = secrets.token_hex(8)
    try:
        lock_fd = _lock(directory, lock_timeout_secs, group.nonce, leave_unfinished=leave_unfinished)
        try:
            share_lock(lock_fd, directory)
        except BaseException:
            os.close(lock_fd)
            raise
    except BaseException as error:
        group.rendezvous.post("opened", json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise
    note = {"nonce": group.nonce, "directory": directory, "replicas": leave_unfinished}
    group.rendezvous.post("opened", json.dumps(note).encode())
    return lock_fd


def _follow(directory: str, group: RankGroup, lock_timeout_secs: float, leave_unfinished: bool) -> int:
    assert group.rendezvous is not None
    note = group.rendezvous.wait("opened", lock_timeout_secs + group.timeout_secs)
    if note is None:
        raise RankFailedError(
            f"rank 0 did not open {directory} within {lock_timeout_secs + group.timeout_secs:g} s; every rank has to make "
            "its Checkpointer",
            (0,),
        )
    body = json.loads(note)
    if "error" in body:
        raise RankFailedError(f"rank 0 could not open {directory}: {body['error']}", (0,))
    if body["replicas"] != leave_unfinished:
        raise ConfigError(
            f"replication.partners is {int(leave_unfinished)} on rank {group.rank}, and not on rank 0: it has to be the same "
            "on all"
        )
    group.nonce = body["nonce"]
    path = os.path.join(directory, LOCK_NAME)
    deadline = time.monotonic() + group.timeout_secs
    while group.nonce not in _content(path):
        if time.monotonic() >= deadline:
            raise UsageError(
                f"rank {group.rank} does not see in {directory} what rank 0 wrote in {body['directory']}; all ranks must use "
                "one directory of one shared file system, or set ranks.together to false"
            )
        time.sleep(_POLL_SECS)
    return lock_directory(directory, lock_timeout_secs, shared=True)


def _content(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(256)
    except OSError:  # not to be seen yet
        return ""
