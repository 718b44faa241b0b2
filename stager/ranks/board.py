"""The ranks' notice board: short notes in the key-value store that the job's process group was made with.

Nothing here is a collective: a note is posted or read by one request to the store's server, and whoever waits for a note
says for how long.
"""

from __future__ import annotations

import time
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from workers.errors import RankFailedError

_FIRST_POLL_SECS = 0.001
_LAST_POLL_SECS = 0.05


class Board:
    """
    Args:
        store: of the job; shared with others, who use other keys.
        prefix: of the keys.

    Every method raises RankFailedError when the store cannot be reached: the process that serves it is gone.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store: Any = PrefixStore(prefix, store)

    def post(self, key: str, note: bytes) -> None:
        try:
            self._store.set(key, note)
        except RuntimeError as error:
            raise _unreachable(error) from error

    def read(self, key: str) -> bytes | None:
        """The note; None if there is none yet."""
        try:
            return bytes(self._store.get(key)) if self._store.check([key]) else None
        except RuntimeError as error:
            raise _unreachable(error) from error

    def add(self, key: str, amount: int = 1) -> int:
        """Count up; the new count."""
        try:
            return int(self._store.add(key, amount))
        except RuntimeError as error:
            raise _unreachable(error) from error

    def wait(self, key: str, timeout_secs: float) -> bytes | None:
        """The note; None if nobody has posted one within ``timeout_secs``. Ctrl-C gets through."""
        deadline, poll = time.monotonic() + timeout_secs, _FIRST_POLL_SECS
        while (note := self.read(key)) is None:
            if time.monotonic() >= deadline:
                return None
            time.sleep(poll)
            poll = min(_LAST_POLL_SECS, poll * 2)
        return note


def _unreachable(error: RuntimeError) -> RankFailedError:
    return RankFailedError(f"the job's store cannot be reached; the process that serves it is gone ({error})", ())
