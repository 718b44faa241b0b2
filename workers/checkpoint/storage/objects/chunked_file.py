"""A data file in an object store, which is kept in chunks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from stager.workers.checkpoint.storage.contract import DataFile
from stager.workers.checkpoint.storage.objects.client import Client
from stager.workers.checkpoint.storage.objects.keys import chunk_key
from stager.workers.errors import CorruptCheckpointError

_PIECE_BYTES = 8 << 20  # a request takes tens of milliseconds, whatever it asks for


class ChunkedFile(DataFile):
    """Reads ranges of the chunks.

    Args:
        data: the prefix of the save's data.
        name, nbytes: of the file.
        starts: offset of each chunk's first byte.
    """

    piece_bytes = _PIECE_BYTES

    def __init__(self, client: Client, data: str, name: str, nbytes: int, starts: Sequence[int]) -> None:
        self._client = client
        self._data = data
        self._name = name
        self.nbytes = nbytes
        self._starts = starts
        self._ends = (*starts[1:], nbytes)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """See :meth:`DataFile.read_into`. Reads from one chunk at a time.

        Raises:
            CorruptCheckpointError: the chunk is gone.
        """
        if offset >= self.nbytes:
            return 0
        chunk = bisect_right(self._starts, offset) - 1
        start = self._starts[chunk]
        wanted = min(len(buffer), self._ends[chunk] - offset)
        key = chunk_key(self._data, self._name, start)
        try:
            found = self._client.get_range(key, offset - start, wanted)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(self._client.url(key), "is missing, a chunk of this checkpoint") from error
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
