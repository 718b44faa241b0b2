"""A data file in an object store, which is kept in stripes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from stager.workers.checkpoint.storage.data_file import DataFile
from stager.workers.checkpoint.storage.objects.client import Client
from stager.workers.checkpoint.storage.objects.keys import stripe_key
from stager.workers.errors import CorruptCheckpointError

_PIECE_BYTES = 8 << 20  # a request takes tens of milliseconds, whatever it asks for


class StripedFile(DataFile):
    """Reads ranges of the stripes.

    Args:
        data: the prefix of the save's data.
        name, nbytes: of the file.
        starts: offset of each stripe's first byte.
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
        """See :meth:`DataFile.read_into`. Reads from one stripe at a time.

        Raises:
            CorruptCheckpointError: the stripe is gone.
        """
        if offset >= self.nbytes:
            return 0
        stripe = bisect_right(self._starts, offset) - 1
        start = self._starts[stripe]
        wanted = min(len(buffer), self._ends[stripe] - offset)
        key = stripe_key(self._data, self._name, start)
        try:
            found = self._client.get_range(key, offset - start, wanted)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(self._client.url(key), "is missing, a stripe of this checkpoint") from error
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
