"""What was measured of the real code, at one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.scale.size import Size


@dataclass(frozen=True, slots=True)
class Commit:
    """By the worker that commits. Seconds are of CPU time; bytes of all ranks together.

    Attributes:
        record_bytes, receipt_bytes: that it reads.
        metadata_bytes, manifest_bytes: that it writes.
        read_secs: reading and checking records and receipts.
        merge_secs: one layout of all ranks'.
        index_secs: ``.metadata``.
        manifest_secs: ``manifest.json``.
        peak_bytes: its memory, beyond what it had before.
    """

    record_bytes: float
    receipt_bytes: float
    metadata_bytes: float
    manifest_bytes: float
    read_secs: float
    merge_secs: float
    index_secs: float
    manifest_secs: float
    peak_bytes: float

    @property
    def secs(self) -> float:
        return self.read_secs + self.merge_secs + self.index_secs + self.manifest_secs


@dataclass(frozen=True, slots=True)
class Parse:
    """By each rank that loads the checkpoint, or sees it before it hears of it: the trainer reads and checks the manifest.

    Attributes:
        secs: of CPU time.
        json_secs: of these in ``json.loads``, which lets no other thread of the trainer run.
        peak_bytes: its memory, beyond what it had before.
    """

    secs: float
    json_secs: float
    peak_bytes: float


@dataclass(frozen=True, slots=True)
class Stock:
    """By ``dcp.async_save``. Seconds are of CPU time; bytes as pickled.

    Attributes:
        plan_bytes: of the plans of all ranks, each as long as the longest: so they are gathered, and scattered.
        result_bytes: of the lists of write results, likewise.
        metadata_bytes: of the metadata that is broadcast.
        plan_secs, finish_secs: of the coordinator, when it has all plans, and all write results.
        load_secs: of every other rank, to unpickle the metadata.
    """

    plan_bytes: float
    result_bytes: float
    metadata_bytes: float
    plan_secs: float
    finish_secs: float
    load_secs: float


@dataclass(frozen=True, slots=True)
class Measured:
    """``stock`` is None where it was not run."""

    size: Size
    commit: Commit
    parse: Parse
    stock: Stock | None

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Measured:
        """From what ``dataclasses.asdict`` gives."""
        stock = Stock(**value["stock"]) if value["stock"] is not None else None
        return Measured(Size(**value["size"]), Commit(**value["commit"]), Parse(**value["parse"]), stock)
