"""The first save of a structure: ``stager/ranks/agreement.py`` in simulated time, with its keys and its notes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stager.ranks.agreement import _COMPARED_KINDS, Entry, _to_json, kind_of, meeting
from tests.benchmarks.scale.simulation import Steps
from tests.benchmarks.scale.store import Rendezvous

OCCASION = "0123456789abcdef"  # as long as a save's id
HEAD = meeting(OCCASION)


@dataclass(frozen=True, slots=True)
class Kind:
    """What the ranks of one kind have beside DTensors.

    Attributes:
        digest, note: of the entries, as they are posted.
        values: digests of the entries' values, by name; the same on all ranks of the kind.
        values_digest, values_note: of these.
    """

    entries: tuple[Entry, ...]
    digest: str
    note: bytes
    values: Mapping[str, str]
    values_digest: str
    values_note: bytes

    @staticmethod
    def of(entries: Sequence[Entry], values: Mapping[str, str]) -> Kind:
        note = json.dumps(values, separators=(",", ":")).encode()
        values_digest = hashlib.blake2b(note, digest_size=16).hexdigest()
        return Kind(tuple(entries), kind_of(entries, ""), _to_json(entries), values, values_digest, note)


def settle(
    rendezvous: Rendezvous, rank: int, num_ranks: int, kinds: Sequence[Kind], kind: Kind, groups: Sequence[str]
) -> Steps[None]:
    """One rank's part in it.

    Args:
        kinds: all that there are, of which ``kind`` is this rank's.
        groups: digests of its groups of shards.
    """
    for group in groups:
        yield from rendezvous.add(f"{HEAD}/group/{group}")
    if (yield from rendezvous.add(f"{HEAD}/plain/{kind.digest}")) == 1:
        yield from rendezvous.post(f"{HEAD}/list/{kind.digest}", kind.note)
        number = yield from rendezvous.add(f"{HEAD}/kinds")
        yield from rendezvous.post(f"{HEAD}/kind/{number}", kind.digest.encode())
    if (yield from rendezvous.add(f"{HEAD}/values/{kind.values_digest}")) == 1:
        number = yield from rendezvous.add(f"{HEAD}/values")
        if number <= _COMPARED_KINDS or rank == 0:
            yield from rendezvous.post(f"{HEAD}/values/list/{number}", kind.values_note)
    yield from rendezvous.barrier(HEAD, rank, num_ranks)
    if rank == 0 and (yield from rendezvous.add(f"{HEAD}/values/{kind.values_digest}", 0)) < num_ranks:
        num_lists = yield from rendezvous.add(f"{HEAD}/values", 0)
        for number in range(1, min(_COMPARED_KINDS, num_lists) + 1):
            yield from rendezvous.wait(f"{HEAD}/values/list/{number}")
    for group in groups:
        yield from rendezvous.add(f"{HEAD}/group/{group}", 0)
    if (yield from rendezvous.add(f"{HEAD}/kinds", 0)) == 1:
        return
    if rank == 0:
        yield from _answer(rendezvous, {kind.digest: kind for kind in kinds})
    yield from rendezvous.wait(f"{HEAD}/answer/{kind.digest}")


def _answer(rendezvous: Rendezvous, kinds: dict[str, Kind]) -> Steps[None]:
    """Rank 0: to each kind of rank, where the holders of each of its names begin, and how many there are."""
    for number in range(1, len(kinds) + 1):
        yield from rendezvous.wait(f"{HEAD}/kind/{number}")
    sizes: dict[str, int] = {}
    for digest in sorted(kinds):
        yield from rendezvous.wait(f"{HEAD}/list/{digest}")
    for digest in sorted(kinds):
        sizes[digest] = yield from rendezvous.add(f"{HEAD}/plain/{digest}", 0)
    totals: dict[str, int] = {}
    held_by: dict[str, list[str]] = {}
    begins: dict[str, list[int]] = {}
    for digest, size in sizes.items():
        begins[digest] = [totals.get(entry.name, 0) for entry in kinds[digest].entries]
        for entry in kinds[digest].entries:
            totals[entry.name] = totals.get(entry.name, 0) + size
            held_by.setdefault(entry.name, []).append(digest)
    numbers: dict[tuple[str, ...], int] = {}
    number_of = {name: numbers.setdefault(tuple(held), len(numbers)) for name, held in held_by.items()}
    for digest in sizes:
        names = [entry.name for entry in kinds[digest].entries]
        holders = [[begin, totals[name], number_of[name]] for begin, name in zip(begins[digest], names, strict=True)]
        yield from rendezvous.post(f"{HEAD}/answer/{digest}", json.dumps({"problem": "", "holders": holders}).encode())
