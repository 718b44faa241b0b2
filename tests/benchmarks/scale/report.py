"""The tables, as Markdown: on the terminal and in docs/scale.md alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.scale.run import Row


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    cell: Callable[[Row], str]


def secs(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.2g} ms"


def count(value: float) -> str:
    return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"


def size(value: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:,.0f} {units[0]}"


def share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.01 else "< 1%"


def _tail(row: Row) -> str:
    return "not in time" if row.save.failed_ranks else secs(row.save.tail_secs)


_AGREEMENT = (
    Column("requests", lambda row: count(row.agreement.requests)),
    Column("of one rank, at most", lambda row: count(row.agreement.busiest_requests)),
    Column("keys and messages", lambda row: size(row.agreement.store_bytes)),
    Column("rendezvous server's load", lambda row: share(row.agreement.store_load)),
    Column("after the last rank came", lambda row: secs(row.agreement.secs)),
)
_SIZE = (
    Column("items", lambda row: count(row.rows)),
    Column("records and receipts", lambda row: size(row.commit.record_bytes + row.commit.receipt_bytes)),
    Column("`.metadata`", lambda row: size(row.commit.metadata_bytes)),
    Column("manifest", lambda row: size(row.commit.manifest_bytes) + ("" if row.readable else " (too large)")),
    Column("committer: CPU", lambda row: secs(row.commit.secs)),
    Column("memory", lambda row: size(row.commit.peak_bytes)),
    Column("reading the manifest: CPU", lambda row: secs(row.parse.secs)),
    Column("without a break", lambda row: secs(row.parse.json_secs)),
    Column("memory", lambda row: size(row.parse.peak_bytes)),
    Column("", lambda row: "" if row.measured else "extrapolated"),
)
_SAVE = (
    Column("rendezvous requests", lambda row: count(row.save.requests)),
    Column("of one rank, at most", lambda row: count(row.save.busiest_requests)),
    Column("keys and messages", lambda row: size(row.save.store_bytes)),
    Column("rendezvous server's load", lambda row: share(row.save.store_load)),
    Column("metadata calls", lambda row: count(row.save.calls)),
    Column("by the committer", lambda row: count(row.save.committer_calls)),
    Column("listings", lambda row: count(row.save.listings)),
    Column("names listed", lambda row: count(row.save.listed)),
    Column("commit", lambda row: secs(row.save.commit_secs)),
    Column("last byte to last rank", _tail),
)
_STOCK = (
    Column("messages", lambda row: count(row.stock.both.messages)),
    Column("bytes", lambda row: size(row.stock.both.nbytes)),
    Column("rank 0: messages", lambda row: count(row.stock.both.coordinator_messages)),
    Column("bytes", lambda row: size(row.stock.both.coordinator_bytes)),
    Column("before the first byte: network", lambda row: secs(row.stock.plan.secs)),
    Column("rank 0's CPU", lambda row: secs(row.stock.plan_secs)),
    Column("after the last byte: network", lambda row: secs(row.stock.end.secs)),
    Column("CPU", lambda row: secs(row.stock.end_secs)),
    Column("metadata to each rank", lambda row: size(row.stock.metadata_bytes)),
)
TABLES = {
    "The first save of a structure: agreement": _AGREEMENT,
    "What is committed": _SIZE,
    "A later save": _SAVE,
    "The same save by stock dcp.async_save": _STOCK,
}


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """Line by line."""
    for title, columns in TABLES.items():
        yield from (f"### {title}", "", "| ranks | " + " | ".join(column.title for column in columns) + " |")
        yield "| ---: " * (1 + len(columns)) + "|"
        for row in rows:
            yield f"| {row.ranks:,} | " + " | ".join(column.cell(row) for column in columns) + " |"
        yield ""
