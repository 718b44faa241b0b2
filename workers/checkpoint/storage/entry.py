"""An entry: one directory of a run, open. Its small files, and where a save's data go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping

from stager.workers.checkpoint.layout.layout import Layout, Segment
from stager.workers.checkpoint.storage.sink import Sink, SinkOptions
from stager.workers.checkpoint.storage.unchanged import HardLinkBase, HashAll, UnchangedFiles


class Entry(ABC):
    """A directory of a run, open. It may lose its name at any time; the entry stays this directory's all the same.

    Attributes:
        path: that it had when it was opened.
        look_secs: so often a worker may look whether the directory is there still.
    """

    path: str
    look_secs: float

    @abstractmethod
    def is_at(self, path: str) -> bool:
        """Return whether the directory has this path now."""

    def is_still(self) -> bool:
        """Return whether the directory still has the path with which it was opened."""
        return self.is_at(self.path)

    @abstractmethod
    def share_lock(self) -> None:
        """Take the directory's lock shared, as one who writes; wait for one who has it alone."""

    @abstractmethod
    def try_lock(self) -> bool:
        """Take the directory's lock alone. Returns False if somebody else has it."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the small files in it, and of the data files."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Read a small file; None: it does not exist.

        Raises:
            CorruptCheckpointError: it cannot be such a file.
            StorageError
        """

    @abstractmethod
    def put(self, name: str, data: bytes, *, sync: bool) -> None:
        """Write a small file: as a whole or not at all, and durably if ``sync``. Raises StorageError."""

    @abstractmethod
    def remove_unnamed(self, keep: Collection[str], num_threads: int) -> None:
        """Remove stager's own files but those of ``keep``. Raises OSError."""

    @abstractmethod
    def sink(self, layout: Layout, options: SinkOptions) -> Sink:
        """Return where the data of a part of ``layout`` go."""

    @abstractmethod
    def stripes(self, layout: Layout) -> tuple[tuple[int, ...], ...]:
        """Return where in each data file its stripes begin, as the manifest names them; () where a file is one piece.

        Raises:
            CorruptCheckpointError: bytes of a data file are missing.
        """

    @abstractmethod
    def link_unchanged(
        self, base: HardLinkBase, layout: Layout, whole: Mapping[int, list[Segment]], hash_all: HashAll
    ) -> UnchangedFiles:
        """Link each file of ``whole`` whose bytes are the same in the hard-link base.

        Args:
            whole: files that the part has all segments of, and these segments.
            hash_all: hashes segments of the slab, one after the other.
        """

    @abstractmethod
    def sync_linked(self, linked: Iterable[int], layout: Layout) -> None:
        """Make linked files durable, given their numbers. Raises StorageError."""

    @abstractmethod
    def sync(self) -> None:
        """Make the names of its files durable. Raises OSError."""

    @abstractmethod
    def close(self) -> None:
        """Close it; gives up its lock."""

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
