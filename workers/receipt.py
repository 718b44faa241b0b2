"""What a worker leaves in the partial directory when its part is written and synced: ``receipt-<part>.json``.

The hashes are those of the part's segments, in the order :func:`workers.layout.deal` gives. A receipt that is there is
whole and true (written to a temporary name, synced, renamed); a set of receipts 0..n-1 is all that a commit needs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from workers import files
from workers.envelope import seal, unseal
from workers.errors import CorruptCheckpointError


@dataclass(frozen=True, slots=True)
class Receipt:
    """Attributes:
    part, num_parts: which part of how many.
    save_id: of the save it belongs to.
    hashes: xxh3_128 of each segment, hex.
    pid: the worker.
    started, written, synced: ``time.time()`` stamps.
    """

    part: int
    num_parts: int
    save_id: str
    hashes: tuple[str, ...]
    pid: int
    started: float
    written: float
    synced: float

    def write(self, directory_fd: int, directory: str, fsync: bool) -> None:
        files.write_atomically(directory_fd, directory, receipt_name(self.part), seal(asdict(self)), fsync)


def receipt_name(part: int) -> str:
    return f"receipt-{part}.json"


def read_receipt(directory_fd: int, directory: str, part: int) -> Receipt | None:
    """The receipt of ``part``, or None when it has none yet."""
    name = receipt_name(part)
    path = os.path.join(directory, name)
    data = files.read_if_exists(directory_fd, name)
    if data is None:
        return None
    try:
        body = unseal(data, path)
        return Receipt(**{**body, "hashes": tuple(body["hashes"])})
    except (TypeError, KeyError) as error:
        raise CorruptCheckpointError(path, f"not a receipt: {error!r}") from error
