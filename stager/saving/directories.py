"""The directories that this process has taken, to save checkpoints there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from stager.ranks.opening import take_directory
from stager.ranks.rank_group import RankGroup
from stager.saving import open_here
from stager.workers.checkpoint.storage.run_lock import RunLock
from stager.workers.memory.descriptor import Descriptor

_MOST = 64  # directories that are held: each takes a descriptor


@dataclass(frozen=True, slots=True)
class _Held:
    """A directory that is held: its lock, and what forgets that this process has it open."""

    lock: RunLock
    forget: Callable[[], None]


class Directories:
    """Takes directories: their locks, and what earlier runs left in them. Every rank takes the same ones, in one order.

    Of many, the one that was taken first is let go of. A save to it that is in flight still holds its lock: see
    :class:`Destination`.

    Args:
        lock_timeout_secs: how long to wait for another run's lock.
        replicates: whether partners keep replicas of what is saved.
        check: raises ConfigError if the settings do not suit the storage of a directory.
    """

    def __init__(
        self, group: RankGroup, lock_timeout_secs: float, check: Callable[[str], None], *, replicates: bool
    ) -> None:
        self._check = check
        self._group = group
        self._lock_timeout_secs = lock_timeout_secs
        self._replicates = replicates
        self._held: dict[str, _Held] = {}
        self._num_tried = 0
        self._register: Callable[[str], Callable[[], None]] = lambda directory: lambda: None

    def belong_to(self, owner: object, finish: Callable[[], None]) -> None:
        """Let this process's next Checkpointer of one of the directories call ``finish``, if nobody holds ``owner``."""
        held = weakref.ref(owner)  # not the owner itself: it could never be dropped

        def register(directory: str) -> Callable[[], None]:
            return open_here.add(here, directory, finish) if (here := held()) is not None else lambda: None

        self._register = register
        self._held = {directory: _Held(one.lock, register(directory)) for directory, one in self._held.items()}

    def take(self, directory: str) -> Descriptor:
        """Return the lock of a directory; take it if it is not held. Every rank calls it.

        Args:
            directory: absolute; it is made if it does not exist.

        Raises:
            DirectoryInUseError, RankFailedError, StorageError, UsageError, ConfigError: :func:`take_directory`.
        """
        if directory not in self._held:
            self._check(directory)
            if len(self._held) >= _MOST:  # in the order in which they were taken, which is the same on all ranks
                self._held.pop(next(iter(self._held))).forget()
            self._num_tried += 1
            lock = take_directory(
                directory,
                self._group,
                self._lock_timeout_secs,
                number=self._num_tried,
                replicates=self._replicates,
                take_over=lambda: open_here.take_over(directory),
            )
            self._held[directory] = _Held(lock, self._register(directory))
        return self._held[directory].lock.descriptor

    def close(self) -> None:
        """Let go of every directory. Legal when nothing is in flight."""
        for held in self._held.values():
            held.forget()
            with suppress(OSError):
                held.lock.close()
        self._held.clear()

    def abandon(self) -> None:
        """Forget the locks in a forked child: otherwise the child would hold the directories."""
        for held in self._held.values():
            with suppress(OSError):
                held.lock.abandon()
        self._held.clear()
