"""Every error stager raises, split by whose fault it is.

    StagerError
    |-- UsageError                  the caller's: fix the call
    |   |-- ConfigError             a wrong key, type or value in YAML, environment or --set
    |   |-- UnstageableError        a value in the state cannot be snapshotted; names its key path
    |   |-- StateMismatchError      load(into=...): keys, shapes or dtypes differ
    |   |-- MemoryBudgetError       the snapshot does not fit arena.max_host_bytes
    |   |-- ArenaFullError          every buffer is in flight and arena.when_full is "raise"
    |   `-- UnsafePickleError       the checkpoint holds a pickled object and allow_pickle is off
    |-- ClosedError                 used after close(), or from a forked child
    |   `-- LeftRunningError        the workers go on with it, but nobody waits for their answer any more
    |-- WorkerError                 a worker process's
    |   |-- WorkerDiedError         it died (pid, exit code or signal, task)
    |   |-- WorkerStartError        it never became ready
    |   `-- TaskTimeoutError        it missed its deadline and was killed
    |-- TornSnapshotError           staging.verify found a tensor that changed while it was copied
    |-- ReplicationError            a rank died or failed while replicas were exchanged; names it
    |-- StorageError                the file system's (path, errno)
    |   |-- DirectoryInUseError     another run holds the directory
    |   `-- CheckpointNotFoundError no such step, or nothing valid to load
    |-- CorruptCheckpointError      bytes on disk are not what was written
    `-- InternalError               ours: a broken invariant; please report it

Chained with ``from`` wherever there is a cause; an exception that comes from a worker carries the worker's
traceback as its ``__cause__`` (:class:`RemoteTraceback`).
"""

from __future__ import annotations

import os
import signal


class StagerError(Exception):
    """Base of everything stager raises on purpose."""


class UsageError(StagerError):
    """The call, not the system, is wrong."""


class ConfigError(UsageError):
    """A setting is unknown, has the wrong type, or an impossible value."""


class UnstageableError(UsageError, TypeError):
    """A value cannot be snapshotted. ``key_path`` names it, e.g. ``optimizer.state[3]['exp_avg']``."""

    def __init__(self, key_path: str, reason: str) -> None:
        super().__init__(f"{key_path}: {reason}")
        self.key_path = key_path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.key_path, self.reason)


class StateMismatchError(UsageError, RuntimeError):
    """What is in the checkpoint does not fit what it is loaded into. Nothing was changed."""


class MemoryBudgetError(UsageError, MemoryError):
    """The snapshot does not fit the host-memory budget. Nothing was allocated."""


class ArenaFullError(UsageError):
    """All buffers hold snapshots that are not yet committed."""


class UnsafePickleError(UsageError):
    """Loading this value would run code from the checkpoint, which was not allowed."""


class ClosedError(StagerError, RuntimeError):
    """The object was closed, or belongs to another process."""


class LeftRunningError(ClosedError):
    """The outcome will not be seen here: the workers were left to finish by themselves."""


class WorkerError(StagerError, RuntimeError):
    """A worker process failed to do its work."""


class WorkerDiedError(WorkerError):
    """A worker process died while it held a task.

    Attributes:
        pid: the dead process.
        exitcode: as in ``subprocess``: negative means killed by that signal; ``None`` if unknown.
        task: what it was doing.
    """

    def __init__(self, pid: int, exitcode: int | None, task: str, hint: str = "") -> None:
        message = f"worker {pid} {describe_exit(exitcode)} while running {task}"
        super().__init__(f"{message}; {hint}" if hint else message)
        self.pid = pid
        self.exitcode = exitcode
        self.task = task
        self.hint = hint

    def __reduce__(self) -> tuple[type, tuple[int, int | None, str, str]]:
        return type(self), (self.pid, self.exitcode, self.task, self.hint)


class WorkerStartError(WorkerError):
    """A worker process did not reach its main loop."""


class TaskTimeoutError(WorkerError, TimeoutError):
    """A task missed its deadline; the worker that held it was killed."""


class TornSnapshotError(StagerError):
    """The state changed while its snapshot was taken; the snapshot was discarded."""


class ReplicationError(StagerError, RuntimeError):
    """A replica could not be exchanged, written or read.

    Attributes:
        rank: global rank of the process that failed, if it is another one's failure; else None.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type, tuple[str, int | None]]:
        return type(self), (str(self), self.rank)


class StorageError(StagerError, OSError):
    """A file system call failed. ``filename`` and ``errno`` are set as on any ``OSError``."""

    def __init__(self, errno: int | None, message: str, path: str) -> None:
        super().__init__(errno, message, path)
        self.message = message
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[int | None, str, str]]:
        return type(self), (self.errno, self.message, self.path)

    def __str__(self) -> str:
        name = f" [{os.strerror(self.errno)}]" if self.errno else ""
        return f"{self.path}: {self.message}{name}"


class DirectoryInUseError(StorageError):
    """Another run is writing checkpoints into this directory."""


class CheckpointNotFoundError(StorageError):
    """There is no such checkpoint, or none that is valid."""


class CorruptCheckpointError(StagerError):
    """The bytes on disk are not the bytes that were committed."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.problem)


class InconsistentRanksError(UsageError):
    """The ranks of a job did not save the same state, so that it cannot be put together."""


class RankFailedError(StagerError, RuntimeError):
    """A save failed, or was not finished in time, on some rank, and so on all of them.

    Attributes:
        ranks: on which.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type, tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


class InternalError(StagerError, AssertionError):
    """A bug in stager."""


class RemoteTraceback(Exception):
    """The traceback, as text, of an exception that was raised in a worker process."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def describe_exit(exitcode: int | None) -> str:
    """``exited with code 3`` or ``was killed by SIGKILL``."""
    if exitcode is None:
        return "died"
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"was killed by {name}"


def _show_as_public_names() -> None:
    """Tracebacks name the place that users import from, not this file."""
    for value in list(globals().values()):
        if isinstance(value, type) and issubclass(value, StagerError):
            value.__module__ = "stager"


_show_as_public_names()
