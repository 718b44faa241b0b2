"""The receipt: a worker's proof that its part is written and synced, ``receipt-<rank>-<part>-of-<parts of rank>.json``.

Its hashes are those of the part's segments, in the order of ``layout.partition``. It is written under a temporary name,
synced, and renamed, so a receipt that exists is whole and true. Every rank's save record and a full set of receipts are all
that a commit needs. The names of the receipts alone tell whether the set is full.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.layout.layout_check import check_count, check_texts
from stager.workers.errors import CorruptCheckpointError

_NAME = re.compile(r"receipt-([0-9]{1,9})-([0-9]{1,9})-of-([0-9]{1,9})\.json")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one part of a save has become.

    Attributes:
        num_parts: of this rank.
        hashes: xxh3_128 of each segment, hex.
        pid: of the worker.
        started, written, synced: ``time.time()`` stamps.
        linked_bytes: size of the unchanged files, which were linked and not written.
        generation: how many saves ago the oldest of these may have been written.
        note: why unchanged files were written all the same; "": none were.
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
    rank: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return receipt_name(self.rank, self.part, self.num_parts)

    def to_bytes(self) -> bytes:
        """Serialise the receipt, sealed."""
        return seal({field.name: getattr(self, field.name) for field in fields(self)})  # asdict() would copy each hash


def receipt_name(rank: int, part: int, num_parts: int) -> str:
    """Return the name of a receipt's file."""
    return f"receipt-{rank}-{part}-of-{num_parts}.json"


def finished_ranks(names: Iterable[str]) -> set[int]:
    """Return the ranks whose receipts are all among ``names``, the files of a partial directory."""
    parts: dict[tuple[int, int], set[int]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            rank, part, num_parts = map(int, match.groups())
            parts.setdefault((rank, num_parts), set()).add(part)
    return {rank for (rank, num_parts), found in parts.items() if found.issuperset(range(num_parts))}


def parse_receipt(data: bytes, path: str, rank: int, part: int, num_parts: int, save_id: str) -> Receipt:
    """Parse the receipt of ``part``.

    Args:
        path: for error messages.

    Raises:
        CorruptCheckpointError: it is damaged, or of another save.
    """
    try:
        body = unseal(data, path)
        receipt = Receipt(**{**body, "hashes": check_texts(body["hashes"])})
        check_count(receipt.linked_bytes)
        check_count(receipt.generation)
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(
            path, f"is not a valid receipt (what a worker leaves when its part is written): {error!r}"
        ) from error
    if (receipt.rank, receipt.part, receipt.num_parts, receipt.save_id) != (rank, part, num_parts, save_id):
        of = f"part {receipt.part} of {receipt.num_parts} of rank {receipt.rank}'s save {receipt.save_id}"
        raise CorruptCheckpointError(path, f"is of {of}, not of this one")
    return receipt
