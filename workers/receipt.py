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
from workers.layout_check import check_count, check_text


@dataclass(frozen=True, slots=True)
class Receipt:
    """Attributes:
    part, num_parts: which part of how many.
    save_id: of the save it belongs to.
    hashes: xxh3_128 of each segment, hex.
    pid: the worker.
    started, written, synced: ``time.time()`` stamps.
    linked_bytes: of the files that were linked to those of an earlier checkpoint, and not written.
    generation: how many saves ago the oldest of these may have been written.
    note: why less was linked than could have been; "": no such reason.
    """

    part: int
    num_parts: int
    save_id: str
    hashes: tuple[str, ...]
    pid: int
    started: float
    written: float
    synced: float
    linked_bytes: int = 0
    generation: int = 0
    note: str = ""

    def write(self, directory_fd: int, directory: str, fsync: bool) -> None:
        files.write_atomically(directory_fd, directory, receipt_name(self.part), seal(asdict(self)), fsync)


def receipt_name(part: int) -> str:
    return f"receipt-{part}.json"


def read_receipt(directory: str, part: int, num_parts: int, save_id: str) -> Receipt | None:
    """The receipt of ``part``, or None when it has none yet.

    Raises:
        CorruptCheckpointError: it is damaged, or of another save.
        StorageError
    """
    path = os.path.join(directory, receipt_name(part))
    data = files.read_if_exists(path)
    if data is None:
        return None
    try:
        body = unseal(data, path)
        receipt = Receipt(**{**body, "hashes": tuple(map(check_text, body["hashes"]))})
        check_count(receipt.linked_bytes)
        check_count(receipt.generation)
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(path, f"not a receipt: {error!r}") from error
    if (receipt.part, receipt.num_parts, receipt.save_id) != (part, num_parts, save_id):
        raise CorruptCheckpointError(
            path, f"is of part {receipt.part} of {receipt.num_parts} of save {receipt.save_id}, not of this one"
        )
    return receipt
