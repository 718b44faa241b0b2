"""Writing a small file in the target directory, as a save does: write, fsync, lock, rename, fsync of the directory."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from stager.doctor.target import ProbeFacts

MAX_PROBE_BYTES = 64 << 20
MAX_PROBE_SECS = 2.0  # on a slow disk less is written
_CHUNK_BYTES = 4 << 20


def existing_directory(path: str) -> str:
    """``path``, or the nearest directory above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return os.path.realpath(path)


def probe_target(target: str, clock: Callable[[], float] = time.monotonic) -> ProbeFacts:
    """Write and remove a small file. Errors are returned, not raised.

    Args:
        target: the directory of a run. It need not exist, and is not made.
        clock: seconds.
    """
    directory = existing_directory(target)
    name = os.path.join(directory, f".stager-doctor-{secrets.token_hex(8)}")
    nbytes, secs = 0, 0.0
    problem, lock_problem = None, None
    step = "create a file"
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            step = "write"
            chunk = os.urandom(_CHUNK_BYTES)  # not zeros: file systems compress those
            started = clock()
            nbytes = _write(fd, chunk, _probe_bytes(directory), clock)
            step = "fsync"
            os.fsync(fd)
            secs = clock() - started
            lock_problem = _try_lock(fd)
        finally:
            os.close(fd)
        step = "rename"
        os.rename(name, f"{name}.renamed")
        step = "fsync the directory"
        _sync_directory(directory)
    except OSError as error:
        problem = f"cannot {step}: {error.strerror}"
    finally:
        for leftover in (name, f"{name}.renamed"):
            with suppress(OSError):
                os.unlink(leftover)
    exists = directory == os.path.realpath(target)
    return ProbeFacts(directory, exists, nbytes, secs, problem, lock_problem)


def _probe_bytes(directory: str) -> int:
    """At most 64 MiB, and never more than a tenth of what is free."""
    stats = os.statvfs(directory)
    return max(1, min(MAX_PROBE_BYTES, stats.f_bavail * stats.f_frsize // 10))


def _write(fd: int, chunk: bytes, nbytes: int, clock: Callable[[], float]) -> int:
    """Write ``chunk`` again and again, up to ``nbytes`` or for the time allowed; returns how much."""
    deadline = clock() + MAX_PROBE_SECS
    written = 0
    while written < nbytes and (written == 0 or clock() < deadline):
        written += os.write(fd, chunk[: nbytes - written])
    return written


def _try_lock(fd: int) -> str | None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"fails: {error.strerror}"
    return None


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
