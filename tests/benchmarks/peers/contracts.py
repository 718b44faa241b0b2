"""What a way to save must offer to be compared. No implementation here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.benchmarks.workload import Workload


class Pending(Protocol):
    """A save under way."""

    def wait_staged(self) -> None:
        """Until the state may be changed in any way."""

    def stored(self) -> bool:
        """Whether it is stored as well as the peer stores it."""

    def wait_stored(self) -> None:
        """Until then; raises what went wrong."""


class Session:
    """A peer that is open on a workload and a directory. Checkpoints are called ``step-<number>``, files or directories."""

    def save(self, step: int) -> Pending:
        raise NotImplementedError

    def load(self, step: int) -> None:
        """Back into the tensors of the workload."""
        raise NotImplementedError

    def around_step(self) -> AbstractContextManager[object]:
        """What the peer tells its users to put around ``optimizer.step()``."""
        return nullcontext()

    def warm_up(self) -> bool:
        """Whatever prepares the first save; False: there is nothing, or it is not used."""
        return False

    def close(self) -> None:
        pass


class Done:
    """The pending save of a call that blocks until it is stored."""

    def wait_staged(self) -> None:
        pass

    def stored(self) -> bool:
        return True

    def wait_stored(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to save, in its stock configuration unless the title says otherwise.

    Attributes:
        name: as given to ``--peer``.
        title: as printed.
        note: what to know when reading its row.
        synced: whether "stored" means that files were synced.
        needs: the module that must be installed; None: none.
        blocking: ``save()`` returns when everything is stored: there is no trainer's speed while persisting.
        ours: stager; the soak case runs it.
    """

    name: str
    title: str
    note: str
    synced: bool
    open: Callable[[Workload, Path], Session]
    needs: str | None = None
    blocking: bool = False
    ours: bool = False


def path_of(directory: Path, step: int, suffix: str = "") -> Path:
    return directory / f"step-{step:08d}{suffix}"
