"""Which ranks hold the same bytes, so that each byte is written once.

Settled through the notice rendezvous, when the structure of the state is new, and kept until it changes again. A rank sends and
reads a handful of short notes, however many ranks there are:

    entries of one spread (a DTensor's mesh and placements) are a *group*. Ranks whose groups have the same names, places
    and shapes hold the same bytes. Each counts itself at the group's digest, which tells it its position, and, when all
    have come, how many there are.

    what is no DTensor is one group. Where it is the same on all ranks, as it should be, and the names of the DTensors are,
    too, no rank learns more than that. Where not (stages of a pipeline), one rank of each kind posts its list, and rank 0
    answers each kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.workers.errors import InconsistentRanksError, RankFailedError

logger = logging.getLogger("stager")

_COMPARED_KINDS = 8
_SHOWN_NAMES = 8
_NONE: Mapping[str, str] = MappingProxyType({})
_WHY = (
    "the structure of the state is new, and the ranks have to settle who writes what; if it changed on some ranks only, "
    "what differs from rank to rank belongs into stager.PerRank(...)"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A leaf that other ranks may hold, too: name, what it is (dtype, or "object"), shape of the whole, place in it."""

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def what(self) -> str:
        return self.kind if self.kind == "object" else f"{self.kind} of shape {self.shape}"


@dataclass(frozen=True, slots=True)
class Holding:
    """This rank is number ``position`` of the ``total`` that hold the same.

    Attributes:
        holders: which ranks these are; a number, the same on all of them.
    """

    position: int
    total: int
    holders: int = field(default=0, compare=False)


ALONE = Holding(0, 1)


@dataclass(frozen=True, slots=True)
class Settled:
    """Attributes:
    plain, groups: for each entry that is no DTensor, and for each group, who holds it.
    alike: all ranks have the same names, in the same containers.
    """

    plain: list[Holding]
    groups: list[Holding]
    alike: bool


class Agreement:
    """Settles who holds what. Every rank has to call :meth:`settle` when its structure is new.

    Args:
        group: with a rendezvous.
    """

    def __init__(self, group: RankGroup) -> None:
        assert group.rendezvous is not None
        self._group = group
        self._rendezvous: Rendezvous = group.rendezvous

    def settle(
        self,
        occasion: str,
        plain: Sequence[Entry],
        groups: Sequence[Sequence[Entry]],
        values: Mapping[str, str] = _NONE,
        outline: str = "",
    ) -> Settled:
        """
        Args:
            occasion: at which the ranks meet; see :func:`meeting`.
            plain: what is no DTensor; sorted by name.
            groups: DTensors, by their spread; each sorted by name.
            values: digests of some of what should be the same on all ranks, by name. Where they are not, rank 0 says so.
            outline: see :func:`stager.ranks.naming.outline`.

        Raises:
            RankFailedError: a rank did not come within ``ranks.timeout_secs``, and is named, or failed before it could. Then
                all fail.
            InconsistentRanksError: a name stands for different tensors on different ranks.
        """
        head = meeting(occasion)
        positions = [self._rendezvous.add(f"{head}/group/{_digest(group)}") - 1 for group in groups]
        kind = kind_of(plain, outline)
        position = self._rendezvous.add(f"{head}/plain/{kind}") - 1
        if position == 0:
            self._rendezvous.post(f"{head}/list/{kind}", _to_json(plain))
            self._rendezvous.post(f"{head}/kind/{self._rendezvous.add(f'{head}/kinds')}", kind.encode())
        kind_of_values = self._post_values(head, values)
        self._group.barrier(head, _WHY)
        if self._group.is_coordinator:
            self._compare_values(head, values, kind_of_values)
        held = [
            Holding(one, self._rendezvous.add(f"{head}/group/{_digest(group)}", 0))
            for one, group in zip(positions, groups, strict=True)
        ]
        num_kinds = self._rendezvous.add(f"{head}/kinds", 0)
        if num_kinds == 1:
            return Settled([Holding(self._group.rank, self._group.num_ranks)] * len(plain), held, alike=True)
        if self._group.is_coordinator:
            self._answer(head, num_kinds)
        return Settled(self._read_answer(head, kind, position, plain), held, alike=False)

    def _post_values(self, head: str, values: Mapping[str, str]) -> str:
        text = json.dumps(dict(values), separators=(",", ":")).encode()
        kind = hashlib.blake2b(text, digest_size=16).hexdigest()
        if self._rendezvous.add(f"{head}/values/{kind}") == 1:
            number = self._rendezvous.add(f"{head}/values")
            if number <= _COMPARED_KINDS or self._group.is_coordinator:
                self._rendezvous.post(f"{head}/values/list/{number}", text)
        return kind

    def _compare_values(self, head: str, values: Mapping[str, str], kind: str) -> None:
        if self._rendezvous.add(f"{head}/values/{kind}", 0) == self._group.num_ranks:
            return
        differing: set[str] = set()
        for number in range(1, min(_COMPARED_KINDS, self._rendezvous.add(f"{head}/values", 0)) + 1):
            theirs = json.loads(self._read(f"{head}/values/list/{number}"))
            differing |= {name for name in values.keys() & theirs.keys() if values[name] != theirs[name]}
        if differing:
            shown = ", ".join(sorted(differing)[:_SHOWN_NAMES]) + (", ..." if len(differing) > _SHOWN_NAMES else "")
            logger.warning(
                "not the same on all ranks, and stored once, as one rank has it: %s. If each rank needs its own back, put "
                "it into stager.PerRank(...)",
                shown,
            )

    def _answer(self, head: str, num_kinds: int) -> None:
        """Rank 0: for each kind of rank, where the holders of each of its names begin, and how many there are."""
        rendezvous = self._rendezvous
        kinds = [self._read(f"{head}/kind/{number}").decode() for number in range(1, num_kinds + 1)]
        lists = {kind: _from_json(self._read(f"{head}/list/{kind}")) for kind in sorted(kinds)}
        sizes = {kind: rendezvous.add(f"{head}/plain/{kind}", 0) for kind in lists}
        known: dict[str, Entry] = {}
        totals: dict[str, int] = {}
        begins: dict[str, list[int]] = {kind: [] for kind in lists}
        kinds_of: dict[str, list[str]] = {}
        problem = ""
        for kind, entries in lists.items():
            for entry in entries:
                first = known.setdefault(entry.name, entry)
                if first != entry:
                    problem = (
                        f"{entry.name} is {first.what} on one rank and {entry.what} on another. What is no DTensor is "
                        "taken to be the same on all ranks that have it; what is not belongs into stager.PerRank(...)"
                    )
                begins[kind].append(totals.get(entry.name, 0))
                totals[entry.name] = totals.get(entry.name, 0) + sizes[kind]
                kinds_of.setdefault(entry.name, []).append(kind)
        numbers: dict[tuple[str, ...], int] = {}
        number_of = {name: numbers.setdefault(tuple(held), len(numbers)) for name, held in kinds_of.items()}
        for kind, entries in lists.items():
            holders = [
                [begin, totals[entry.name], number_of[entry.name]]
                for begin, entry in zip(begins[kind], entries, strict=True)
            ]
            rendezvous.post(f"{head}/answer/{kind}", json.dumps({"problem": problem, "holders": holders}).encode())

    def _read_answer(self, head: str, kind: str, position: int, plain: Sequence[Entry]) -> list[Holding]:
        answer: Mapping[str, object] = json.loads(self._read(f"{head}/answer/{kind}"))
        if answer["problem"]:
            raise InconsistentRanksError(str(answer["problem"]))
        holders: object = answer["holders"]
        assert isinstance(holders, list) and len(holders) == len(plain)
        return [
            # What rank 0 has, too, counts from it: it writes the objects.
            Holding(self._group.rank if total == self._group.num_ranks else begin + position, total, number)
            for begin, total, number in holders
        ]

    def _read(self, key: str) -> bytes:
        note = self._rendezvous.wait(key, self._group.timeout_secs)
        if note is None:
            raise RankFailedError(f"rank 0 did not say who writes what within {self._group.timeout_secs:g} s", (0,))
        return note


def meeting(occasion: str) -> str:
    """Where the ranks meet. Named for the save that needs it, and not counted: of two ranks, one may have tried before."""
    return f"agreement/{occasion}"


def kind_of(plain: Sequence[Entry], outline: str) -> str:
    """The same on two ranks that have the same, but for what their shards are."""
    return hashlib.blake2b(_to_json(plain) + outline.encode(), digest_size=16).hexdigest()


def _to_json(entries: Sequence[Entry]) -> bytes:
    rows = [[e.name, e.kind, e.shape, e.offsets, e.lengths] for e in entries]
    return json.dumps(rows, separators=(",", ":")).encode()


def _from_json(data: bytes) -> list[Entry]:
    return [
        Entry(name, kind, tuple(shape), tuple(offsets), tuple(lengths))
        for name, kind, shape, offsets, lengths in json.loads(data)
    ]


def _digest(entries: Sequence[Entry]) -> str:
    return hashlib.blake2b(_to_json(entries), digest_size=16).hexdigest()
