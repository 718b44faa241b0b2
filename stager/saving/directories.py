"""The directories that this process has taken, to save checkpoints there."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress

from stager.ranks.opening import take_directory
from stager.ranks.rank_group import RankGroup
from stager.saving import open_here
from stager.workers.memory.descriptor import Descriptor


class Directories:
    """Takes directories: their locks, and what earlier runs left in them. Every rank takes the same ones, in one order.

    Args:
        lock_timeout_secs: how long to wait for another run's lock.
        replicates: whether partners keep replicas of what is saved.
    """

    def __init__(self, group: RankGroup, lock_timeout_secs: float, *, replicates: bool) -> None:
        self._group = group
        self._lock_timeout_secs = lock_timeout_secs
        self._replicates = replicates
        self._locks: dict[str, Descriptor] = {}
        self._num_tried = 0
        self._registered = ExitStack()
        self._register: Callable[[str], Callable[[], None]] = lambda directory: lambda: None

    def belong_to(self, owner: object, finish: Callable[[], None]) -> None:
        """Let this process's next Checkpointer of one of the directories call ``finish``, if nobody holds ``owner``."""
        held = weakref.ref(owner)  # not the owner itself: it could never be dropped

        def register(directory: str) -> Callable[[], None]:
            return open_here.add(here, directory, finish) if (here := held()) is not None else lambda: None

        self._register = register
        for directory in self._locks:
            self._registered.callback(self._register(directory))

    def take(self, directory: str) -> Descriptor:
        """Return the lock of a directory; take it if it was not taken yet. Every rank calls it.

        Args:
            directory: absolute; it is made if it does not exist.

        Raises:
            DirectoryInUseError, RankFailedError, StorageError, UsageError, ConfigError: :func:`take_directory`.
        """
        if directory not in self._locks:
            self._num_tried += 1
            lock_fd = take_directory(
                directory,
                self._group,
                self._lock_timeout_secs,
                number=self._num_tried,
                replicates=self._replicates,
                take_over=lambda: open_here.take_over(directory),
            )
            self._locks[directory] = Descriptor(lock_fd)
            self._registered.callback(self._register(directory))
        return self._locks[directory]

    def close(self) -> None:
        """Let go of every directory. Legal when nothing is in flight."""
        self._registered.close()
        self.abandon()

    def abandon(self) -> None:
        """Close the locks' descriptors in a forked child: otherwise the child would hold the directories."""
        while self._locks:
            _, lock = self._locks.popitem()
            with suppress(OSError):
                os.close(lock.fd)
