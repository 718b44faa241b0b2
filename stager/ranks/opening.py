"""How the ranks of a job take the run's directory: one makes sure that nobody else has it, then they hold it together.

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

from stager.ranks.job import Job
from workers.directory import LOCK_NAME, lock_directory, share_lock
from workers.errors import ConfigError, RankFailedError, UsageError
from workers.files import storage_errors
from workers.recover import recover

logger = logging.getLogger("stager")

_POLL_SECS = 0.02


def take_directory(directory: str, job: Job, lock_timeout_secs: float, *, leave_unfinished: bool = False) -> int:
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
    if job.board is None:
        return _lock(directory, lock_timeout_secs, leave_unfinished=leave_unfinished)
    host = f"host/{socket.gethostname()}"
    job.board.add(host)
    try:
        if job.leads:
            lock_fd = _lead(directory, job, lock_timeout_secs, leave_unfinished)
        else:
            lock_fd = _follow(directory, job, lock_timeout_secs, leave_unfinished)
    except BaseException as error:
        with suppress(RankFailedError):
            job.call_off("opening", f"failed on rank {job.rank}: {type(error).__name__}: {error}", [job.rank])
        raise
    try:
        job.meet("opening", f"opening {directory}")
        job.local_size = job.board.add(host, 0)
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


def _lead(directory: str, job: Job, lock_timeout_secs: float, leave_unfinished: bool) -> int:
    assert job.board is not None
    job.nonce = secrets.token_hex(8)
    try:
        lock_fd = _lock(directory, lock_timeout_secs, job.nonce, leave_unfinished=leave_unfinished)
        try:
            share_lock(lock_fd, directory)
        except BaseException:
            os.close(lock_fd)
            raise
    except BaseException as error:
        job.board.post("opened", json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise
    note = {"nonce": job.nonce, "directory": directory, "replicas": leave_unfinished}
    job.board.post("opened", json.dumps(note).encode())
    return lock_fd


def _follow(directory: str, job: Job, lock_timeout_secs: float, leave_unfinished: bool) -> int:
    assert job.board is not None
    note = job.board.wait("opened", lock_timeout_secs + job.timeout_secs)
    if note is None:
        raise RankFailedError(
            f"rank 0 did not open {directory} within {lock_timeout_secs + job.timeout_secs:g} s; every rank has to make "
            "its Checkpointer",
            (0,),
        )
    body = json.loads(note)
    if "error" in body:
        raise RankFailedError(f"rank 0 could not open {directory}: {body['error']}", (0,))
    if body["replicas"] != leave_unfinished:
        raise ConfigError(
            f"replication.partners is {int(leave_unfinished)} on rank {job.rank}, and not on rank 0: it has to be the same "
            "on all"
        )
    job.nonce = body["nonce"]
    path = os.path.join(directory, LOCK_NAME)
    deadline = time.monotonic() + job.timeout_secs
    while job.nonce not in _content(path):
        if time.monotonic() >= deadline:
            raise UsageError(
                f"rank {job.rank} does not see in {directory} what rank 0 wrote in {body['directory']}; all ranks must use "
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
