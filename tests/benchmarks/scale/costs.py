"""What a commit costs at a size: from what was measured, between and beyond the measured sizes by a straight line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from tests.benchmarks.scale.fit import Linear, fit
from tests.benchmarks.scale.measured import Commit, Measured, Parse, Stock
from tests.benchmarks.scale.size import Size

T = TypeVar("T", Commit, Parse, Stock)


@dataclass(frozen=True, slots=True)
class Costs:
    """Attributes:
    record_bytes, receipt_bytes: of one rank, of one part.
    metadata_bytes, manifest_bytes: of the checkpoint.
    commit_secs, parse_secs: CPU time of who commits, and of who reads the manifest.
    """

    record_bytes: float
    receipt_bytes: float
    metadata_bytes: float
    manifest_bytes: float
    commit_secs: float
    parse_secs: float


class CostModel:
    """Attributes:
    commit, parse, stock: a line for each figure.
    """

    def __init__(self, measured: Sequence[Measured]) -> None:
        self._sizes = sizes = [one.size for one in measured]
        with_stock = [(one.size, one.stock) for one in measured if one.stock is not None]
        self.commit = _lines(Commit, sizes, [one.commit for one in measured])
        self.parse = _lines(Parse, sizes, [one.parse for one in measured])
        self.stock = _lines(Stock, [size for size, _ in with_stock], [stock for _, stock in with_stock])

    def reaches(self, size: Size) -> bool:
        """Whether commits were measured with as many rows, and with as many names; beyond that the lines are lengthened."""
        return size.rows <= max(one.rows for one in self._sizes) and size.names <= max(one.names for one in self._sizes)

    def commit_at(self, size: Size) -> Commit:
        return Commit(**{name: line.at(size) for name, line in self.commit.items()})

    def parse_at(self, size: Size) -> Parse:
        return Parse(**{name: line.at(size) for name, line in self.parse.items()})

    def stock_at(self, size: Size) -> Stock:
        return Stock(**{name: line.at(size) for name, line in self.stock.items()})

    def at(self, size: Size, num_parts: int) -> Costs:
        commit, parse = self.commit_at(size), self.parse_at(size)
        return Costs(
            record_bytes=commit.record_bytes / size.ranks,
            receipt_bytes=commit.receipt_bytes / size.ranks / num_parts,
            metadata_bytes=commit.metadata_bytes,
            manifest_bytes=commit.manifest_bytes,
            commit_secs=commit.secs,
            parse_secs=parse.secs,
        )


def _lines(kind: type[T], sizes: Sequence[Size], values: Sequence[T]) -> dict[str, Linear]:
    return {field.name: fit(sizes, [getattr(value, field.name) for value in values]) for field in fields(kind)}
