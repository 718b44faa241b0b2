"""What this rank writes of a state: from all its leaves to those, or the rows of those, that are its partition.

    PerRank values          all of them
    a DTensor               the local shard; where other ranks hold the same shard, a partition of it
    anything else           is the same on all ranks: the tensors are divided by size, rank 0 writes the objects

What several ranks hold is cut into partitions of about the same number of bytes, one for each of them (``cutting.py``). A
tensor that is cut is stored in chunks, which every reader of the format knows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stager.ranks.agreement import Agreement, Partition, Settlement, hash_of
from stager.ranks.cutting import WrittenLeaf, cut_leaves, is_stored_raw
from stager.ranks.messages import LeafEntry
from stager.ranks.naming import name_all, name_written, outline
from stager.ranks.rank_group import RankGroup
from stager.state.flatten import StateTree
from stager.state.shards import Shard, is_sharded, locals_of, shard_of, spread_of
from stager.state.tensor_kinds import PLAIN_TENSORS
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.structure import ABSENT, Node, Path, describe, fqn
from stager.workers.errors import UnstageableError

_COMPARED_BYTES = 64 << 10
_STRETCHES = 16  # that are compared of a larger tensor
_COMPARED_DEPTH = 4
_Tensor: Any = torch.Tensor


@dataclass(frozen=True, slots=True)
class _Division:
    """How a state was divided: what that depends on, and the result."""

    signature: tuple[Any, ...]
    written: tuple[WrittenLeaf, ...]
    structure: Node
    kinds: frozenset[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _Settled:
    """What the ranks were asked, this rank's outline then, and the answer."""

    entries: tuple[list[LeafEntry], list[list[LeafEntry]]]
    outline: str
    settlement: Settlement


class Partitioner:
    """Takes this rank's partition of states. It keeps how it divided the last one."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._agreement = Agreement(group)
        self._division: _Division | None = None
        self._settled: _Settled | None = None

    def take(self, tree: StateTree, save_id: str) -> StateTree:
        """The leaves that this rank writes. Every rank calls it: where the structure is new, it waits for all.

        Raises:
            UnstageableError: a DTensor that cannot be stored; two leaves of one name.
            RankFailedError, InconsistentRanksError: see :class:`Agreement`.
        """
        sharded = _sharded_leaves(tree)
        if self._group.is_alone and not sharded:
            return tree
        here = tree.leaves
        if sharded:
            here = list(here)
            for leaf, local in zip(sharded, locals_of([here[leaf] for leaf in sharded]), strict=True):
                # One without elements has its shape here, too.
                here[leaf] = local if here[leaf].numel() else torch.empty(tuple(here[leaf].shape), dtype=local.dtype)
        signature = _signature(tree, sharded, here)
        if self._division is None or self._division.signature != signature:
            self._division = self._divide(tree, sharded, signature, save_id)
        division = self._division
        leaves = [here[part.leaf] if part.rows is None else None for part in division.written]
        rows_of: dict[tuple[int, tuple[int, int]], torch.Tensor] = {}  # one tensor object stays one
        for number, part in enumerate(division.written):
            if part.rows is not None:
                tensor, (first, last) = here[part.leaf], part.rows
                key = id(tensor), part.rows
                if key not in rows_of:
                    rows_of[key] = tensor.detach().narrow(0, first, last - first)
                leaves[number] = rows_of[key]
        return StateTree(leaves, division.structure, tree.odd_keys, kinds=division.kinds, pickled=tree.pickled)

    def forget(self) -> None:
        """Let go of what was kept."""
        self._division = self._settled = None

    def _divide(self, tree: StateTree, sharded: Sequence[int], signature: tuple[Any, ...], save_id: str) -> _Division:
        # 1. Which leaves other ranks may hold, too: DTensors by their spread, and plain ones, each sorted by name.
        if not self._group.is_alone:
            _check_names(tree)
        for leaf in tree.private.intersection(sharded):
            why = "is a DTensor in PerRank: it belongs to all ranks of its mesh; take it out of there"
            raise UnstageableError(tree.name(leaf), why)
        shards = {leaf: shard_of(tree.leaves[leaf], tree.name(leaf)) for leaf in sharded}
        names = tree.names
        spreads: dict[Hashable, list[int]] = {}
        plain: list[int] = []
        for leaf in sorted(range(len(names)), key=names.__getitem__):
            shard = shards.get(leaf)
            if shard is not None and 0 not in shard.shape:
                spreads.setdefault(shard.spread, []).append(leaf)
            elif (shard is not None or leaf not in shards) and leaf not in tree.private:
                plain.append(leaf)  # or a DTensor without elements, which is the same everywhere
        # 2. Ask the other ranks who holds them.
        settled = self._settle(tree, names, plain, list(spreads.values()), shards, save_id)
        # 3. Cut what several ranks hold. Values in PerRank are written whole, and shards without elements not at all.
        parts = {leaf: WrittenLeaf(leaf, None) for leaf in tree.private}
        by_spread = zip(spreads.values(), settled.spreads, strict=True)
        for leaves, partition in [*_by_holders(plain, settled.plain), *by_spread]:
            parts.update((part.leaf, part) for part in cut_leaves(tree, leaves, partition, shards))
        for leaf, shard in shards.items():
            if shard is not None and 0 in shard.lengths and 0 not in shard.shape:
                parts.pop(leaf, None)
        # 4. The structure with a number, or a chunk, in the place of each leaf that this rank writes.
        written = tuple(parts[leaf] for leaf in sorted(parts))
        nodes = {part.leaf: _node(part, number, tree, shards.get(part.leaf)) for number, part in enumerate(written)}
        name = name_written if settled.same_names and not self._group.is_coordinator else name_all
        return _Division(signature, written, name(tree.structure, lambda leaf: nodes.get(leaf, ABSENT)), _kinds(tree))

    def _settle(
        self,
        tree: StateTree,
        names: Sequence[str],
        plain: Sequence[int],
        spreads: Sequence[Sequence[int]],
        shards: dict[int, Shard | None],
        save_id: str,
    ) -> Settlement:
        """Agree with the other ranks, unless they have answered the same question before."""
        if self._group.is_alone:
            _check_complete(names, shards)
        entries = (
            [_entry(names[leaf], tree.leaves[leaf]) for leaf in plain],
            [[_entry(names[leaf], tree.leaves[leaf], shards[leaf]) for leaf in spread] for spread in spreads],
        )
        own_outline = outline(tree.structure, tree.private)
        # A rank's PerRank values and the types of its objects may change on that rank alone: no other rank would come.
        if self._settled is None or self._settled.entries != entries:

            def digests() -> dict[str, str]:
                return {names[leaf]: value for leaf in plain if (value := _digest_of(tree.leaves[leaf])) is not None}

            settlement = self._agreement.settle(save_id, *entries, digests, own_outline)
            self._settled = _Settled(entries, own_outline, settlement)
        settled = self._settled
        # The same names in other containers: no rank was asked, so this rank names everything itself.
        return settled.settlement if own_outline == settled.outline else replace(settled.settlement, same_names=False)


def _check_names(tree: StateTree) -> None:
    """Raise UnstageableError for two leaves of one name: a rank that writes one of them does not see the other."""
    seen: dict[str, Path] = {}
    for path in tree.paths:
        name = fqn(path)
        if name in seen:
            raise UnstageableError(
                describe(path),
                f"has the same name in the checkpoint as {describe(seen[name])}: {name!r}; rename one",
            )
        seen[name] = path


def _check_complete(names: Sequence[str], shards: dict[int, Shard | None]) -> None:
    """Raise UnstageableError for a DTensor of which other ranks have the rest."""
    for leaf, shard in shards.items():
        if shard is None or (shard.lengths != shard.shape and 0 not in shard.shape):
            raise UnstageableError(
                names[leaf],
                "is a DTensor of which other ranks have the rest, and this one saves for itself: let them save "
                "together (ranks.together, and init_process_group() before the Checkpointer is made), or save its "
                "full or local tensor",
            )


def _sharded_leaves(tree: StateTree) -> list[int]:
    kinds = {kind for kind in set(map(type, tree.leaves)) - PLAIN_TENSORS if hasattr(kind, "__tensor_flatten__")}
    if not kinds:
        return []
    return [number for number, leaf in enumerate(tree.leaves) if type(leaf) in kinds and is_sharded(leaf)]


def _signature(tree: StateTree, sharded: Sequence[int], here: Sequence[Any]) -> tuple[Any, ...]:
    """What the division depends on: everything but where the tensors are, and what is in them.

    Args:
        here: the leaves, with local tensors in the place of DTensors.
    """
    leaves = tree.leaves
    kinds = list(map(type, leaves))
    tensors = leaves if PLAIN_TENSORS.issuperset(kinds) else [x for x in leaves if isinstance(x, torch.Tensor)]
    held = tensors if not sharded and tensors is leaves else [x for x in here if isinstance(x, torch.Tensor)]
    try:
        sizes: list[Any] = list(map(_Tensor.size, tensors))
        strides: list[Any] = list(map(_Tensor.stride, held))
        addresses: list[int] = list(map(_Tensor.data_ptr, held))
    except (RuntimeError, NotImplementedError):  # sparse, nested and the like have none
        sizes = [None if x.is_nested else x.size() for x in tensors]
        strides = [x.stride() if is_stored_raw(x) else None for x in held]
        addresses = [x.data_ptr() if is_stored_raw(x) else 0 for x in held]
    dtypes = [tensor.dtype for tensor in tensors]
    places = [spread_of(leaves[number]) for number in sharded]
    ties = _ties(addresses)
    return tree.structure, tree.odd_keys, tree.private, kinds, sizes, dtypes, strides, sharded, places, ties


def _ties(addresses: Sequence[int]) -> list[int]:
    """For each tensor the first one that is at the same address: what is tied to what. Empty: nothing is."""
    if len(set(addresses)) == len(addresses):
        return []
    first: dict[int, int] = {}
    return [first.setdefault(address or -number - 1, number) for number, address in enumerate(addresses)]


def _entry(name: str, value: Any, shard: Shard | None = None) -> LeafEntry:
    if shard is not None:
        return LeafEntry(name, name_of(value.dtype), shard.shape, shard.offsets, shard.lengths)
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return LeafEntry(name, name_of(value.dtype), tuple(value.shape))
    return LeafEntry(name, "object")


def _digest_of(value: Any) -> str | None:
    """Of what can be compared: host tensors (of large ones, some stretches), and values of Python's own types."""
    if not isinstance(value, torch.Tensor):
        return hash_of(repr(value).encode("utf-8", "surrogatepass")) if _is_simple(value) else None
    if not value.is_cpu or type(value) not in PLAIN_TENSORS or not is_stored_raw(value) or not value.nbytes:
        return None
    flat = value.detach().resolve_conj().resolve_neg()
    if value.nbytes <= _COMPARED_BYTES:
        return hash_of(flat.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if not flat.is_contiguous():
        return None
    whole, length = flat.view(-1).view(torch.uint8), _COMPARED_BYTES // _STRETCHES
    starts = [(len(whole) - length) * number // (_STRETCHES - 1) for number in range(_STRETCHES)]
    return hash_of(torch.cat([whole.narrow(0, start, length) for start in starts]).numpy().tobytes())


def _is_simple(value: Any, depth: int = 0) -> bool:
    if type(value) not in (list, tuple):
        return type(value) in (type(None), bool, int, float, complex, str, bytes)
    return depth < _COMPARED_DEPTH and len(value) <= _COMPARED_BYTES and all(_is_simple(e, depth + 1) for e in value)


def _by_holders(leaves: Sequence[int], partitions: Sequence[Partition]) -> list[tuple[list[int], Partition]]:
    """Leaves that the same ranks hold: all of these ranks cut the same leaves, in the same order."""
    groups: dict[int, tuple[list[int], Partition]] = {}
    for leaf, partition in zip(leaves, partitions, strict=True):
        groups.setdefault(partition.holders, ([], partition))[0].append(leaf)
    return list(groups.values())


def _node(part: WrittenLeaf, number: int, tree: StateTree, shard: Shard | None) -> Node:
    """What the structure says of a leaf: the number of the item that holds all of it, or one chunk and its place."""
    if part.rows is None and (shard is None or shard.shape == shard.lengths or 0 in shard.shape):
        return number
    shape = list(tree.leaves[part.leaf].shape)  # of the whole DTensor, if it is one
    offsets = [0] * len(shape) if shard is None else list(shard.offsets)
    if part.rows is not None:
        offsets[0] += part.rows[0]
    return ["chunks", shape, [[offsets, number]]]


def _kinds(tree: StateTree) -> frozenset[tuple[str, int]]:
    tensors = (leaf for leaf in tree.leaves if isinstance(leaf, torch.Tensor) and is_stored_raw(leaf))
    return frozenset((name_of(tensor.dtype), tensor.dim()) for tensor in tensors)
