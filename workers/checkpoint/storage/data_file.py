"""A data file of a committed checkpoint, open for reading."""

from __future__ import annotations

from abc import ABC, abstractmethod


class DataFile(ABC):
    """A data file of a committed checkpoint.

    Attributes:
        nbytes: its size.
        piece_bytes: how much of it is best read at once.
    """

    nbytes: int
    piece_bytes: int

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from byte ``offset`` on. Returns how many bytes it got; 0: the file ends there.

        Raises:
            CorruptCheckpointError: bytes that the manifest names are gone.
            OSError
        """

    @abstractmethod
    def close(self) -> None:
        """Close it."""
