"""A directory of a run on a file system, open by its descriptor.

Writing relative to the descriptor means that a directory which is renamed or replaced meanwhile cannot lead a write astray.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterable, Mapping

from stager.workers.checkpoint.layout.layout import Layout, Segment
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.in_threads import in_threads
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.file_sink import FileSink
from stager.workers.checkpoint.storage.posix.hard_link_base import link_unchanged, sync_linked
from stager.workers.checkpoint.storage.posix.own_files import own_files
from stager.workers.checkpoint.storage.sink import Sink, SinkOptions
from stager.workers.checkpoint.storage.unchanged import HardLinkBase, HashAll, UnchangedFiles


class DirectoryEntry(Entry):
    """An open directory. Its lock is a ``flock``, which a process gives up when it dies.

    Attributes:
        fd: its descriptor.
    """

    look_secs = 0.2  # each look costs a file server

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    def is_at(self, path: str) -> bool:
        """See :meth:`Entry.is_at`."""
        return files.is_still(path, self.fd)

    def share_lock(self) -> None:
        """See :meth:`Entry.share_lock`."""
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    def try_lock(self) -> bool:
        """See :meth:`Entry.try_lock`."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def names(self) -> list[str]:
        """See :meth:`Entry.names`."""
        return os.listdir(self.fd)

    def read(self, name: str) -> bytes | None:
        """See :meth:`Entry.read`."""
        return files.read_if_exists(os.path.join(self.path, name))

    def put(self, name: str, data: bytes, *, sync: bool) -> None:
        """See :meth:`Entry.put`."""
        files.write_atomically(self.fd, self.path, name, data, sync)

    def remove_unnamed(self, keep: Collection[str], num_threads: int) -> None:
        """See :meth:`Entry.remove_unnamed`."""
        unnamed = sorted(set(own_files(self.fd)).difference(keep))
        in_threads(lambda name: files.remove(os.path.join(self.path, name)), unnamed, num_threads)

    def sink(self, layout: Layout, options: SinkOptions) -> Sink:
        """See :meth:`Entry.sink`."""
        return FileSink(layout, options, self.fd, self.path)

    def stripes(self, layout: Layout) -> tuple[tuple[int, ...], ...]:
        """See :meth:`Entry.stripes`. Each file is one piece."""
        return ()

    def link_unchanged(
        self, base: HardLinkBase, layout: Layout, whole: Mapping[int, list[Segment]], hash_all: HashAll
    ) -> UnchangedFiles:
        """See :meth:`Entry.link_unchanged`."""
        return link_unchanged(base, layout, whole, hash_all, self.fd)

    def sync_linked(self, linked: Iterable[int], layout: Layout) -> None:
        """See :meth:`Entry.sync_linked`."""
        sync_linked(linked, layout, self.fd, self.path)

    def sync(self) -> None:
        """See :meth:`Entry.sync`."""
        os.fsync(self.fd)

    def close(self) -> None:
        """See :meth:`Entry.close`."""
        os.close(self.fd)
