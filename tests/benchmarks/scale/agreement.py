"""The first save of a structure: ``stager/ranks/agreement.py`` in simulated time, with its keys and its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stager.ranks import keys
from stager.ranks.agreement import COMPARED_VALUES, answers, hash_of, kind_of
from stager.ranks.messages import KindOfRank, LeafDigests, LeafEntry, ValuesCompared, encode
from tests.benchmarks.scale.simulation import Steps
from tests.benchmarks.scale.store import SimulatedGroup

SAVE_ID = "0123456789abcdef"
HEAD = keys.agreement(SAVE_ID)


@dataclass(frozen=True, slots=True)
class Kind:
    """What the ranks of one kind have beside DTensors, as they post it.

    Attributes:
        plain: the entries.
        values: digests of the entries' values; the same on all ranks of the kind.
        values_digest: of these.
    """

    plain: KindOfRank
    values: LeafDigests
    values_digest: str

    @staticmethod
    def of(entries: Sequence[LeafEntry], digests: Mapping[str, str]) -> Kind:
        values = LeafDigests(0, dict(digests), {})
        return Kind(KindOfRank(kind_of(entries, ""), tuple(entries)), values, hash_of(encode(values)))


def _gathered(group: SimulatedGroup, kinds: Sequence[Kind]) -> Steps[list[Kind]]:
    """All kinds, in the order in which their ranks contributed them."""
    by_note = {encode(kind.plain): kind for kind in kinds}
    return [by_note[note] for note in (yield from group.gather(f"{HEAD}/kinds"))]


def _compare(group: SimulatedGroup, rank: int, kinds: Sequence[Kind]) -> Steps[None]:
    if rank == 0:
        for one in (yield from _gathered(group, kinds)):
            yield from group.gather(f"{HEAD}/values/{one.plain.digest}", COMPARED_VALUES)
        yield from group.post(f"{HEAD}/compared", ValuesCompared(""))
    else:
        yield from group.receive(f"{HEAD}/compared")


def settle(
    group: SimulatedGroup, rank: int, num_ranks: int, kinds: Sequence[Kind], kind: Kind, spreads: Sequence[str]
) -> Steps[None]:
    """One rank's part in it.

    Args:
        kinds: all that there are, of which ``kind`` is this rank's.
        spreads: digests of its spreads.
    """
    for spread in spreads:
        yield from group.count(f"{HEAD}/spread/{spread}")
    if (yield from group.count(f"{HEAD}/kind/{kind.plain.digest}")) == 1:
        yield from group.contribute(f"{HEAD}/kinds", kind.plain)
    of_kind = f"{HEAD}/values/{kind.plain.digest}"
    values_key = f"{HEAD}/same-values/{kind.plain.digest}/{kind.values_digest}"
    if (yield from group.count(values_key)) == 1:
        yield from group.contribute(of_kind, replace(kind.values, rank=rank), None if rank == 0 else COMPARED_VALUES)
    yield from group.barrier(HEAD, rank, num_ranks)
    if (yield from group.count(values_key, 0)) < num_ranks:
        yield from _compare(group, rank, kinds)
    for spread in spreads:
        yield from group.count(f"{HEAD}/spread/{spread}", 0)
    if (yield from group.count(f"{HEAD}/kinds/count", 0)) == 1:
        return
    if rank == 0:
        gathered = yield from _gathered(group, kinds)
        sizes: dict[str, int] = {}
        for one in gathered:
            sizes[one.plain.digest] = yield from group.count(f"{HEAD}/kind/{one.plain.digest}", 0)
        for digest, answer in answers([one.plain for one in gathered], sizes).items():
            yield from group.post(f"{HEAD}/answer/{digest}", answer)
    yield from group.receive(f"{HEAD}/answer/{kind.plain.digest}")
