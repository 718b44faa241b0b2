"""A sink: takes the data of a part of a save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass

from stager.workers.checkpoint.storage.writing import Writing


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """How a part of a save is written.

    Attributes:
        nbytes: of all that will be put.
        own_files: numbers of the files that only this part writes.
        early: what was put will be synced, so writing it may begin at once.
        before_write: called with the number of bytes of each write.
    """

    nbytes: int
    own_files: Collection[int]
    writing: Writing
    early: bool
    before_write: Callable[[int], None]


class Sink(ABC):
    """Takes the bytes of a part, most of them in file order. Every method raises the ``OSError`` of an earlier write."""

    @abstractmethod
    def put(self, file: int, offset: int, piece: bytes | memoryview, *, in_place: bool = False) -> None:
        """Take a piece, which must not change before :meth:`flush` has returned.

        Args:
            file: its number in the layout.
            offset: of the piece in the file.
            in_place: the piece has the same place within a block of memory and within a block of the file.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until everything that was put is written."""

    @abstractmethod
    def sync(self) -> None:
        """Make what was written durable."""

    @abstractmethod
    def close(self) -> None:
        """Release what the sink has. What was not flushed may be lost."""
