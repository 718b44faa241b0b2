"""Every error that stager raises, grouped by whose fault it is.

    StagerError                       base of all errors below
    |-- UsageError                    the caller's fault: correct the call
    |   |-- ArgumentError             an argument of the wrong type, or with a value that cannot be meant
    |   |-- ConfigError               an unknown key, a wrong type or a bad value in YAML, environment or --set
    |   |-- UnstageableError          a value of the state cannot be saved; names its key path
    |   |-- StateMismatchError        load(into=...): keys, shapes or dtypes differ
    |   |-- UnloadableError           intact bytes that cannot be made into the object here; names its key path
    |   |-- MemoryBudgetError         the snapshot does not fit arena.max_host_bytes
    |   |-- ArenaFullError            every slab is in flight and arena.when_full is "raise"
    |   |-- UnsafePickleError         the checkpoint holds a pickled object and allow_pickle is off
    |   `-- InconsistentRanksError    the ranks of a job saved different states
    |-- ClosedError                   used after close(), or in a forked child
    |   `-- LeftRunningError          the workers finish the task, but this process does not see the result
    |-- WorkerError                   a worker process failed
    |   |-- WorkerDiedError           it died; names pid, exit code or signal, and task
    |   |-- WorkerStartError          it never became ready
    |   `-- TaskTimeoutError          its task missed the deadline, and the worker was killed
    |-- TornSnapshotError             a tensor changed during its copy (guard(), staging.verify)
    |-- AbandonedSnapshotError        a worker was to write a snapshot that never became whole; the save's error says why
    |-- WithdrawnError                a checkpoint was deleted while its save was in flight: the save is cancelled
    |-- ReplicationError              a replica could not be exchanged; names the rank that failed
    |-- StorageError                  the file system failed; names path and errno
    |   |-- DirectoryInUseError       another run writes into the directory
    |   `-- CheckpointNotFoundError   no such step, or no valid checkpoint
    |-- CorruptCheckpointError        bytes on disk are not the bytes that were written
    |-- RankFailedError               a save failed on some rank, and therefore on all ranks
    `-- InternalError                 stager's own fault: please report it
    RemoteTraceback                   never raised: the ``__cause__`` of an error that comes from a worker

An error that has a cause is raised ``from`` it. ``tests/house/test_errors.py`` compares this tree with the classes.
"""

from __future__ import annotations

import os
import signal
from typing import Any


class StagerError(Exception):
    """Base of every error that stager raises on purpose: catch it to catch them all."""

    def __reduce__(self) -> Any:
        # Each argument of an __init__ below is an attribute, too. The copy of an error in another process is made from them.
        code = getattr(type(self).__init__, "__code__", None)
        if code is None:  # no __init__ of our own
            return super().__reduce__()
        return type(self), tuple(getattr(self, name) for name in code.co_varnames[1 : code.co_argcount])


class UsageError(StagerError):
    """The caller's mistake: correct the call."""


class ArgumentError(UsageError, TypeError, ValueError):
    """The caller's mistake: correct the argument, which has the wrong type, or a value that cannot be meant."""


class ConfigError(UsageError):
    """The caller's mistake: correct the setting, which is unknown, has the wrong type or an impossible value."""


class UnstageableError(UsageError, TypeError):
    """The caller's mistake: remove or convert the value, which cannot be saved.

    Attributes:
        key_path: where the value is, ``optimizer.state[3]['exp_avg']`` for example.
        reason: why it cannot be saved, and what to do.
    """

    def __init__(self, key_path: str, reason: str) -> None:
        super().__init__(f"{key_path}: {reason}")
        self.key_path = key_path
        self.reason = reason


class StateMismatchError(UsageError, RuntimeError):
    """The caller's mistake: load into a state like the saved one. The target was not changed."""


class UnloadableError(UsageError, RuntimeError):
    """The program's fault: correct its class or ``load_state_dict()``. The checkpoint is intact, and none older was tried.

    Attributes:
        key_path: where the value is in the checkpoint.
        reason: what failed, and what to do. The original error is the ``__cause__``.
    """

    def __init__(self, key_path: str, reason: str) -> None:
        super().__init__(f"{key_path}: {reason}")
        self.key_path = key_path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.key_path, self.reason)


class MemoryBudgetError(UsageError, MemoryError):
    """The caller's setting: raise ``arena.max_host_bytes`` or save a smaller state. Nothing was allocated."""


class ArenaFullError(UsageError):
    """The caller's setting: save less often, or raise ``arena.buffers``. All slabs hold snapshots not yet committed."""


class UnsafePickleError(UsageError):
    """The caller's choice: pass ``allow_pickle`` if you trust the checkpoint. Loading the value would run its code."""


class InconsistentRanksError(UsageError):
    """The caller's mistake: save the same state on every rank. The ranks' states do not form one checkpoint."""


class ClosedError(StagerError, RuntimeError):
    """The caller's mistake: make a new object. This one was closed, or belongs to another process."""


class LeftRunningError(ClosedError):
    """Nobody's fault: detached workers finish the task; look for its checkpoint later, its result is not seen here."""


class WorkerError(StagerError, RuntimeError):
    """A worker process failed: the message says how. The next task gets a healthy worker."""


class WorkerDiedError(WorkerError):
    """A worker process died while it held a task: the message says of what, and what to look at.

    Attributes:
        pid: the dead process.
        exitcode: as in ``subprocess``: negative means killed by that signal; ``None`` if unknown.
        task: label of the task that it was running.
        hint: more about the cause, for the message.
    """

    def __init__(self, pid: int, exitcode: int | None, task: str, hint: str = "") -> None:
        message = f"worker {pid} {describe_exit(exitcode)} while running {task}"
        super().__init__(f"{message}; {hint}" if hint else message)
        self.pid = pid
        self.exitcode = exitcode
        self.task = task
        self.hint = hint


class WorkerStartError(WorkerError):
    """A worker process did not become ready: read its standard error, and run ``stager doctor``."""


class TaskTimeoutError(WorkerError, TimeoutError):
    """A task missed its deadline and its worker was killed: raise ``workers.task_timeout_secs`` or check the storage."""


class TornSnapshotError(StagerError):
    """The caller's program changed the state during its snapshot: write to it later. The snapshot was discarded."""


class AbandonedSnapshotError(StagerError):
    """Of another error: a worker was to write a snapshot that will never be whole; the error of its save says why.

    Attributes:
        is_orphan: nobody is left to say so: the process that took the snapshot is gone.
    """

    def __init__(self, is_orphan: bool) -> None:
        super().__init__(
            "the snapshot was never whole: the process that took it "
            + ("is gone" if is_orphan else "gave it up, and its save says why")
        )
        self.is_orphan = is_orphan


class WithdrawnError(StagerError):
    """A checkpoint was deleted while its save was in flight. The save's ``upload_completion`` is cancelled."""


class ReplicationError(StagerError, RuntimeError):
    """A replica could not be exchanged, written or read: look at the rank that the message names.

    Attributes:
        rank: global rank of the other process that failed; None if this process failed.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank


class StorageError(StagerError, OSError):
    """The file system failed: correct what the message names, then save again. Earlier checkpoints are untouched.

    Attributes:
        errno: as on any ``OSError``; None if no system call failed.
        path: the file or directory, also in ``filename``.
        message: what was attempted.
    """

    def __init__(self, errno: int | None, message: str, path: str) -> None:
        super().__init__(errno, message, path)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        name = f" [{os.strerror(self.errno)}]" if self.errno else ""
        return f"{self.path}: {self.message}{name}"


class DirectoryInUseError(StorageError):
    """Another run writes checkpoints into this directory: stop it, or choose another directory."""


class CheckpointNotFoundError(StorageError):
    """No such checkpoint exists, or none is valid: ``stager ls`` lists what is there."""


class CorruptCheckpointError(StagerError):
    """The storage changed committed bytes: load an earlier step. ``stager verify`` lists the damage.

    Attributes:
        path: the damaged file or directory.
        problem: how it differs.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class RankFailedError(StagerError, RuntimeError):
    """A save failed or missed its deadline on some rank, and therefore on all: look at the ranks that are named.

    Attributes:
        ranks: global ranks that failed.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.message = message
        self.ranks = ranks


class InternalError(StagerError, AssertionError):
    """A bug in stager: please report it, with the message and the traceback."""

    def __str__(self) -> str:
        return f"{super().__str__()}: this is a bug in stager; please report it with this message and the traceback"


class RemoteTraceback(Exception):
    """A worker's traceback as text; the ``__cause__`` of an error that was raised there. Never raised itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def describe_exit(exitcode: int | None) -> str:
    """Say in words how a process ended: ``exited with code 3`` or ``was killed by SIGKILL``."""
    if exitcode is None:
        return "died"
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"was killed by {name}"


# Tracebacks name the place that users import from, not this file.
for _class in [value for value in globals().values() if isinstance(value, type) and issubclass(value, StagerError)]:
    _class.__module__ = "stager"
del _class
