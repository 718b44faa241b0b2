"""The lock of a run: of those who write to its directory, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod

from stager.workers.memory.descriptor import Descriptor


class RunLock(ABC):
    """The lock of a run, held by this process.

    Attributes:
        descriptor: a duplicate of it travels with each write task: the lock is held until the last one is closed.
    """

    descriptor: Descriptor

    @abstractmethod
    def share(self) -> None:
        """Let the run's other ranks take it, too. Raises DirectoryInUseError: another run took it in between."""

    @abstractmethod
    def close(self) -> None:
        """Give it up in this process. Tasks that are under way still hold it."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget it in a forked child: its parent holds it still."""
