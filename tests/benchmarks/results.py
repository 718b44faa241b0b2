"""Everything of a run, to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.benchmarks.machine import Machine, Versions
from tests.benchmarks.records import Failure, Record, from_json, to_json

FORMAT = 2

R = TypeVar("R")


@dataclass(slots=True)
class Row:
    """One peer on one case. ``outcome`` is how its last child ended; what was measured before that is in ``records``."""

    peer: str
    outcome: str = "ok"
    message: str = ""
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def of(self, kind: type[R]) -> list[R]:
        return [record for record in self.records if isinstance(record, kind)]

    def fail(self, failure: Failure) -> None:
        self.outcome, self.message = failure.outcome, failure.message

    def note(self, notes: Iterator[str] | tuple[str, ...]) -> None:
        self.notes += [note for note in notes if note not in self.notes]


@dataclass(slots=True)
class CaseResults:
    name: str
    what: str
    rows: dict[str, Row] = field(default_factory=dict)


@dataclass(slots=True)
class Results:
    """One run. ``options`` as they were given, for the reader."""

    date: str
    machine: Machine
    versions: Versions
    options: dict[str, Any]
    cases: dict[str, CaseResults] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(self.options["scale"])

    def row(self, case: str, peer: str) -> Row | None:
        found = self.cases.get(case)
        return found.rows.get(peer) if found is not None else None

    def save(self, path: Path) -> None:
        value = {
            "format": FORMAT,
            "date": self.date,
            "machine": asdict(self.machine),
            "versions": asdict(self.versions),
            "options": self.options,
            "cases": {name: _case_to_json(case) for name, case in self.cases.items()},
        }
        path.write_text(json.dumps(value, indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        value = json.loads(path.read_text())
        if value["format"] != FORMAT:
            raise ValueError(f"{path} has format {value['format']}, this is {FORMAT}")
        return Results(
            value["date"],
            Machine(**value["machine"]),
            Versions(**value["versions"]),
            value["options"],
            {name: _case_from_json(name, case) for name, case in value["cases"].items()},
        )


def _case_to_json(case: CaseResults) -> dict[str, Any]:
    rows = {
        name: {
            "outcome": row.outcome,
            "message": row.message,
            "notes": row.notes,
            "records": [to_json(r) for r in row.records],
        }
        for name, row in case.rows.items()
    }
    return {"what": case.what, "rows": rows}


def _case_from_json(name: str, value: dict[str, Any]) -> CaseResults:
    rows = {
        peer: Row(peer, row["outcome"], row["message"], row["notes"], [from_json(r) for r in row["records"]])
        for peer, row in value["rows"].items()
    }
    return CaseResults(name, value["what"], rows)
