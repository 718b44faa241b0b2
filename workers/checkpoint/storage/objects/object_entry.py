"""A directory of a run in an object store: the objects under a save's prefix."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from stager.workers.checkpoint.documents.own_names import is_own
from stager.workers.checkpoint.layout.layout import Layout, Segment
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.objects.client import Client
from stager.workers.checkpoint.storage.objects.decision import is_being_removed
from stager.workers.checkpoint.storage.objects.head_of import head_of
from stager.workers.checkpoint.storage.objects.keys import Place, Standing, join, place_of
from stager.workers.checkpoint.storage.objects.stripe_sink import StripeSink
from stager.workers.checkpoint.storage.sink import Sink, SinkOptions
from stager.workers.checkpoint.storage.unchanged import HardLinkBase, HashAll, UnchangedFiles
from stager.workers.errors import CorruptCheckpointError, InternalError


class ObjectEntry(Entry):
    """The objects of one save.

    It has no lock: whoever commits does so by creating one object, and a part that is run again writes what is there.

    Args:
        place: what ``path`` means.
        save_id: of the save that the entry is, also where ``place`` is a checkpoint.

    Attributes:
        data: the prefix of its objects.
    """

    look_secs = 5.0  # each look is two requests

    def __init__(self, client: Client, path: str, place: Place, save_id: str) -> None:
        self.path = path
        self.client = client
        self.place = place
        self.save_id = save_id
        self.data = place.data(save_id)

    def is_at(self, path: str) -> bool:
        """See :meth:`Entry.is_at`."""
        place = place_of(path[len(self.client.url("")) :])
        if place.standing is Standing.CHECKPOINT:
            head = head_of(self.client, place)
            return head is not None and head.save_id == self.save_id
        return (place.standing is Standing.REMOVING) == is_being_removed(self.client, place, self.save_id)

    def share_lock(self) -> None:
        """Do nothing."""

    def try_lock(self) -> bool:
        """Return True: nobody is kept from anything."""
        return True

    def names(self) -> list[str]:
        """See :meth:`Entry.names`."""
        prefixes, objects = self.client.list_directory(self.data)
        return prefixes + [found.key.rpartition("/")[2] for found in objects]

    def read(self, name: str) -> bytes | None:
        """See :meth:`Entry.read`."""
        try:
            return self.client.get(join(self.data, name))
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes, *, sync: bool) -> None:
        """See :meth:`Entry.put`. What is in the store is durable."""
        self.client.put(join(self.data, name), data)

    def remove_unnamed(self, keep: Collection[str], num_threads: int) -> None:
        """See :meth:`Entry.remove_unnamed`."""
        _, objects = self.client.list_directory(self.data)
        names = [found.key.rpartition("/")[2] for found in objects]
        self.client.delete([join(self.data, name) for name in names if is_own(name) and name not in keep])

    def sink(self, layout: Layout, options: SinkOptions) -> Sink:
        """See :meth:`Entry.sink`."""
        return StripeSink(self.client, self.data, layout, options)

    def stripes(self, layout: Layout) -> tuple[tuple[int, ...], ...]:
        """See :meth:`Entry.stripes`."""
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for one in self.client.walk(self.data):
            file, slash, offset = one.key[len(self.data) + 1 :].rpartition("/")
            if slash and offset.isdigit():
                found[file].append((int(offset), one.nbytes))
        return tuple(self._starts(file.name, file.nbytes, sorted(found[file.name])) for file in layout.files)

    def _starts(self, name: str, nbytes: int, stripes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        end = 0
        for start, length in stripes:
            if start != end:
                break
            end += length
        if end != nbytes or sum(length for _, length in stripes) != nbytes:
            raise CorruptCheckpointError(
                os.path.join(self.path, name), f"has stripes up to byte {end:,}, and should have {nbytes:,} bytes"
            )
        return tuple(start for start, _ in stripes)

    def link_unchanged(
        self, base: HardLinkBase, layout: Layout, whole: Mapping[int, list[Segment]], hash_all: HashAll
    ) -> UnchangedFiles:
        """See :meth:`Entry.link_unchanged`. Incremental saves are refused before they get here."""
        raise InternalError("an object store has no hard links, so no save to it is incremental")

    def sync_linked(self, linked: Iterable[int], layout: Layout) -> None:
        """Do nothing: nothing is linked."""

    def sync(self) -> None:
        """Do nothing: what is in the store is durable."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def missing(path: str) -> FileNotFoundError:
    """Return the error that nothing is at ``path``."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
