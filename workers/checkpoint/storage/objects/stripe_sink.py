"""Where a part's data go in an object store: stripes of a data file, several of them on the way at once.

The client sends the pieces of a stripe from where they lie in the slab, so no copy of the state is made, whatever its size.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.storage.objects.client import Client
from stager.workers.checkpoint.storage.objects.keys import stripe_key
from stager.workers.checkpoint.storage.sink import Sink, SinkOptions
from stager.workers.faults import point

STRIPE_BYTES = 32 << 20  # large enough that a request's delay does not count, small enough to be sent again
_AT_ONCE = 8  # of one worker; not measured yet on a store that is far away


class StripeSink(Sink):
    """Uploads stripes of at most ``STRIPE_BYTES`` and one piece.

    A part that is run again uploads the same stripes: where they begin follows from its pieces.

    Args:
        data: the prefix of the save's data.
    """

    def __init__(self, client: Client, data: str, layout: Layout, options: SinkOptions) -> None:
        self._client = client
        self._data = data
        self._layout = layout
        self._options = options
        self._executor = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="stager-upload")
        self._under_way: deque[Future[None]] = deque()
        self._pieces: list[bytes | memoryview] = []
        self._nbytes = 0
        self._file, self._offset = -1, 0  # where the pieces begin

    def put(self, file: int, offset: int, piece: bytes | memoryview, *, in_place: bool = False) -> None:
        """See :meth:`Sink.put`."""
        if file != self._file or offset != self._offset + self._nbytes or self._nbytes >= STRIPE_BYTES:
            self._submit()
            self._file, self._offset = file, offset
        self._pieces.append(piece)
        self._nbytes += len(piece)

    def flush(self) -> None:
        """Wait until every stripe is in the store."""
        self._submit()
        while self._under_way:
            self._under_way.popleft().result()

    def sync(self) -> None:
        """Do nothing: what is in the store is durable."""
        point("part.sync")

    def close(self) -> None:
        """Wait for the uploads under way, and begin no other."""
        self._executor.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        if not self._nbytes:
            return
        while len(self._under_way) >= _AT_ONCE:  # an error is raised here, not lost
            self._under_way.popleft().result()
        self._options.before_write(self._nbytes)
        key = stripe_key(self._data, self._layout.files[self._file].name, self._offset)
        self._under_way.append(self._executor.submit(self._client.put, key, self._pieces))
        self._pieces, self._nbytes, self._file = [], 0, -1
