"""Which ranks hold the same leaves, so that each byte is written once.

The ranks agree when the structure of the state is new, and keep the result until it changes again. However many ranks there
are, each sends and reads a handful of short messages:

1. Each rank counts itself at the digest of each of its *spreads*: sharded tensors that lie on the same ranks. Ranks whose
   spreads have the same names, boxes and shapes hold the same bytes. The count is the rank's number among them.
2. Each rank counts itself at the digest of its *plain* leaves, which are not sharded: its *kind*. The first rank of a kind
   contributes the list (``KindOfRank``). The first ranks of a kind that have certain values contribute their digests
   (``LeafDigests``): two that differ are enough to know, and so a few are kept of each kind.
3. All come to a barrier. Only now are the counts final, and the lists complete.
4. If not all ranks have the same values, rank 0 compares the digests and says which tensors differ (``ValuesCompared``).
   That is an error on every rank: only one rank's values would be stored, and the other ranks would get them.
5. One kind: every rank holds every plain leaf, and knows that. Several kinds (stages of a pipeline): rank 0 gathers the
   lists, and answers each kind (``WhoHolds``).

A group of one holds everything, and sends nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from stager.ranks import keys
from stager.ranks.messages import HolderRange, KindOfRank, LeafDigests, LeafEntry, ValuesCompared, WhoHolds, encode
from stager.ranks.rank_group import RankGroup, some_ranks
from stager.workers.errors import InconsistentRanksError
from stager.workers.wording import first_of

logger = logging.getLogger("stager")

COMPARED_VALUES = 8  # of so many different sets of values of a kind, rank 0 reads the digests
_SHOWN_NAMES = 8
_PROBLEM = (
    "these tensors have the same name and shape on several ranks, and other values: {}. Only one rank's would be stored, "
    "and every rank would get them. FSDP1: save FSDP.state_dict() and FSDP.optim_state_dict(model, optimizer), not the "
    "plain optimizer. A value of which each rank has its own: put it into stager.PerRank(...). If one rank's values are "
    "good for all: ranks.differing: warn"
)
_WHY = (
    "the structure of the state is new, and the ranks have to agree on who writes what; if it changed on some ranks only, "
    "what differs from rank to rank belongs into stager.PerRank(...)"
)


@dataclass(frozen=True, slots=True)
class Partition:
    """Which part of some leaves this rank writes: number ``index`` of ``count``, one for each rank that holds them.

    ``holders``: which ranks these are; a number, the same on all of them.
    """

    index: int
    count: int
    holders: int = field(default=0, compare=False)


WHOLE = Partition(0, 1)


@dataclass(frozen=True, slots=True)
class Settlement:
    """This rank's partition of each plain leaf, and of each spread; and whether all ranks have the same names."""

    plain: list[Partition]
    spreads: list[Partition]
    same_names: bool


class Agreement:
    """Agrees with the other ranks on who holds what. Every rank calls :meth:`settle` when its structure is new.

    Args:
        group: the ranks that make one checkpoint together.
        differing: what tensors are that are not sharded and not the same on all ranks: "error" or "warn"
            (``ranks.differing`` of the configuration; that of rank 0 counts).
    """

    def __init__(self, group: RankGroup, differing: str = "error") -> None:
        self._group = group
        self._is_error = differing == "error"

    def settle(
        self,
        save_id: str,
        plain: Sequence[LeafEntry],
        spreads: Sequence[Sequence[LeafEntry]],
        digests: Callable[[], LeafDigests] = lambda: LeafDigests(0, {}, {}),
        outline: str = "",
    ) -> Settlement:
        """Agree. Follows the steps at the head of this file.

        Args:
            plain: what is not sharded; sorted by name.
            spreads: the boxes of sharded tensors, by their spread; each sorted by name.
            digests: makes the digests of the values that should be the same on all ranks, whatever rank they name.
            outline: see :func:`stager.ranks.naming.outline`.

        Raises:
            RankFailedError: on all ranks, if one did not come within ``ranks.timeout_secs``, or failed before it could.
            InconsistentRanksError: on all ranks; a name stands for different tensors, or for different values of one.
        """
        group, head = self._group, keys.agreement(save_id)
        if group.is_alone:
            return Settlement([WHOLE] * len(plain), [WHOLE] * len(spreads), same_names=False)
        # 1. and 2. Contributions come before the barrier, because lists are read after it.
        spread_keys = [f"{head}/spread/{kind_of(spread, '')}" for spread in spreads]
        indexes = [group.count(key) - 1 for key in spread_keys]
        kind = kind_of(plain, outline)
        index = group.count(f"{head}/kind/{kind}") - 1
        if index == 0:
            group.contribute(f"{head}/kinds", KindOfRank(kind, tuple(plain)))
        values = replace(digests(), rank=0)
        values_key = f"{head}/same-values/{kind}/{hash_of(encode(values))}"
        if group.count(values_key) == 1:
            group.contribute(f"{head}/values/{kind}", replace(values, rank=group.rank), at_most=COMPARED_VALUES)
        # 3.
        group.barrier(head, _WHY)
        # 4. Either all ranks see that all have the same values, or none does.
        if group.count(values_key, 0) < group.num_ranks:
            self._compare(head)
        held = [Partition(one, group.count(key, 0)) for one, key in zip(indexes, spread_keys, strict=True)]
        # 5.
        if group.num_contributed(f"{head}/kinds") == 1:
            return Settlement([Partition(group.rank, group.num_ranks)] * len(plain), held, same_names=True)
        if group.is_coordinator:
            self._answer(head)
        return Settlement(self._read_answer(head, kind, index), held, same_names=False)

    def _compare(self, head: str) -> None:
        """Have rank 0 compare the values of all ranks.

        Raises:
            InconsistentRanksError: tensors differ.
        """
        key = f"{head}/compared"
        task = "compare the values of all ranks"
        answer = self._group.broadcast(key, ValuesCompared, lambda: ValuesCompared(self._compared(head)), task)
        if answer.problem:
            raise InconsistentRanksError(answer.problem)

    def _compared(self, head: str) -> str:
        """Compare; warn of what is no error, and return the error."""
        group = self._group
        kinds = group.gather(f"{head}/kinds", KindOfRank)
        found = [
            values
            for kind in kinds
            for values in group.gather(f"{head}/values/{kind.digest}", LeafDigests, at_most=COMPARED_VALUES)
        ]
        entries = Counter(entry.name for entry in {entry for kind in kinds for entry in kind.entries})
        alike = {name for name, count in entries.items() if count == 1}  # the others are an error of their own
        tensors = differing([(values.rank, values.tensors) for values in found], alike)
        others = differing([(values.rank, values.others) for values in found], alike)
        if not self._is_error:
            tensors, others = {}, {**tensors, **others}
        if others:
            logger.warning(
                "not the same on all ranks, and stored once, as one rank has it: %s. If each rank needs its own back, put "
                "it into stager.PerRank(...)",
                _named(others),
            )
        return _PROBLEM.format(_named(tensors)) if tensors else ""

    def _answer(self, head: str) -> None:
        """Answer each kind of rank: where the holders of each of its entries begin, and how many there are."""
        kinds = self._group.gather(f"{head}/kinds", KindOfRank)
        sizes = {kind.digest: self._group.count(f"{head}/kind/{kind.digest}", 0) for kind in kinds}
        for digest, answer in answers(kinds, sizes).items():
            self._group.post(f"{head}/answer/{digest}", answer)

    def _read_answer(self, head: str, kind: str, index: int) -> list[Partition]:
        answer = self._group.receive(f"{head}/answer/{kind}", WhoHolds, "rank 0 did not say who writes what")
        if answer.problem:
            raise InconsistentRanksError(answer.problem)
        num_ranks = self._group.num_ranks
        return [
            # Leaves that all ranks hold are counted by rank: rank 0 then writes the objects among them.
            Partition(self._group.rank if total == num_ranks else begin + index, total, holders)
            for begin, total, holders in answer.holders
        ]


def answers(kinds: Sequence[KindOfRank], sizes: Mapping[str, int]) -> dict[str, WhoHolds]:
    """What rank 0 answers, by the kind's digest. ``sizes``: how many ranks are of each kind, by its digest."""
    known: dict[str, LeafEntry] = {}
    totals: dict[str, int] = {}
    begins: dict[str, list[int]] = {}
    kinds_of: dict[str, list[str]] = {}
    problem = ""
    for kind in sorted(kinds, key=lambda kind: kind.digest):
        begins[kind.digest] = [totals.get(entry.name, 0) for entry in kind.entries]
        for entry in kind.entries:
            first = known.setdefault(entry.name, entry)
            if first != entry:
                problem = (
                    f"{entry.name} is {first.what} on one rank and {entry.what} on another. What is not sharded is "
                    "taken to be the same on all ranks that have it; what is not belongs into stager.PerRank(...)"
                )
            totals[entry.name] = totals.get(entry.name, 0) + sizes[kind.digest]
            kinds_of.setdefault(entry.name, []).append(kind.digest)
    numbers: dict[tuple[str, ...], int] = {}
    number_of = {name: numbers.setdefault(tuple(held), len(numbers)) for name, held in kinds_of.items()}

    def holders(kind: KindOfRank) -> Iterator[HolderRange]:
        for begin, entry in zip(begins[kind.digest], kind.entries, strict=True):
            yield HolderRange(begin, totals[entry.name], number_of[entry.name])

    return {kind.digest: WhoHolds(problem, tuple(holders(kind))) for kind in kinds}


def differing(found: Sequence[tuple[int, Mapping[str, str]]], names: Set[str]) -> dict[str, list[int]]:
    """Find the names whose digests are not all the same; for each, the first rank that has each digest.

    Args:
        found: (rank, its digests by name).
        names: those that count.
    """
    seen: dict[str, dict[str, int]] = {}
    for rank, digests in sorted(found, key=lambda one: one[0]):
        for name, digest in digests.items():
            seen.setdefault(name, {}).setdefault(digest, rank)
    return {name: list(ranks.values()) for name, ranks in sorted(seen.items()) if len(ranks) > 1 and name in names}


def _named(found: Mapping[str, Sequence[int]]) -> str:
    """Name leaves, and ranks on which they differ."""
    return first_of([f"{name} (ranks {some_ranks(ranks)})" for name, ranks in found.items()], _SHOWN_NAMES)


def kind_of(plain: Sequence[LeafEntry], outline: str) -> str:
    """A digest of a rank's plain leaves and outline: the same on two ranks that differ only in their shards."""
    return hash_of(encode(KindOfRank(outline, tuple(plain))))


def hash_of(data: bytes) -> str:
    """A digest of 32 characters, which may be part of a key."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
