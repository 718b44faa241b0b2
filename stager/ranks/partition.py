"""What this rank writes of a state: from all its leaves to those, or the rows of those, that are its partition.

    PerRank values          all of them
    a sharded tensor        this rank's boxes of it; where other ranks hold the same boxes, a partition of them
    anything else           is the same on all ranks: the tensors are divided by size, rank 0 writes the objects

What several ranks hold is cut into partitions of about the same number of bytes, one for each of them (``cutting.py``). A
tensor that is cut is stored in chunks, which every reader of the format knows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stager.ranks.agreement import Agreement, Partition, Settlement
from stager.ranks.cutting import WrittenLeaf, cut_leaves, is_stored_raw
from stager.ranks.digests import digests_of
from stager.ranks.messages import LeafEntry
from stager.ranks.naming import name_all, name_written, outline
from stager.ranks.rank_group import RankGroup
from stager.state.shards import Shard, is_complete, is_sharded, shape_of, shard_of, spread_of, views_of
from stager.state.state_tree import StateTree
from stager.state.tensor_kinds import PLAIN_TENSORS
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.structure import ABSENT, Node
from stager.workers.errors import UnstageableError
from stager.workers.memory.tensor_memory import problem_of

_Views = Mapping[int, Sequence[torch.Tensor]]
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
    """Takes this rank's partition of states. It keeps how it divided the last one.

    Args:
        group: the ranks that make one checkpoint together.
        differing: see :class:`Agreement`.
        has_chunks: whether the format stores tensors in chunks. It always does where there are several ranks.
    """

    def __init__(self, group: RankGroup, differing: str = "error", *, has_chunks: bool = True) -> None:
        self._group = group
        self._has_chunks = has_chunks
        self._agreement = Agreement(group, differing)
        self._division: _Division | None = None
        self._settled: _Settled | None = None

    def take(self, tree: StateTree, save_id: str) -> StateTree:
        """Return the leaves that this rank writes. Every rank calls it: where the structure is new, it waits for all.

        Raises:
            UnstageableError: a sharded tensor that cannot be stored.
            RankFailedError, InconsistentRanksError: see :class:`Agreement`.
        """
        sharded = _sharded_leaves(tree)
        if self._group.is_alone and not sharded:
            return tree
        views = {leaf: views_of(tree.leaves[leaf]) for leaf in sharded}
        signature = _signature(tree, views)
        if self._division is None or self._division.signature != signature:
            self._division = self._divide(tree, views, signature, save_id)
        division = self._division
        made: dict[tuple[int, Any], torch.Tensor] = {}  # one tensor object stays one, also where it is cut
        leaves = [_written(part, tree, views, made) for part in division.written]
        return StateTree(leaves, division.structure, tree.odd_keys, kinds=division.kinds, pickled=tree.pickled)

    def forget(self) -> None:
        """Let go of what was kept."""
        self._division = self._settled = None

    def _divide(self, tree: StateTree, views: _Views, signature: tuple[Any, ...], save_id: str) -> _Division:
        # 1. Which leaves other ranks may hold, too: sharded ones by their spread, and plain ones, each sorted by name.
        names = tree.names
        for leaf in tree.private.intersection(views):
            why = "is sharded, and in PerRank: it belongs to all ranks that have a part of it; take it out of there"
            raise UnstageableError(tree.name(leaf), why)
        shards = {leaf: shard_of(tree.leaves[leaf], tree.name(leaf)) for leaf in views}
        spreads: dict[Hashable, list[int]] = {}
        plain: list[int] = []
        for leaf in sorted(range(len(names)), key=names.__getitem__):
            shard = shards.get(leaf)
            if shard is not None and not shard.is_empty:
                spreads.setdefault(shard.spread, []).append(leaf)
            elif (shard is not None or leaf not in shards) and leaf not in tree.private:
                plain.append(leaf)  # or a sharded one without elements, which is the same everywhere
        # 2. Ask the other ranks who holds them.
        settled = self._settle(tree, names, plain, list(spreads.values()), shards, save_id)
        # 3. Cut what several ranks hold. Values in PerRank are written whole.
        written = [WrittenLeaf(leaf, None) for leaf in tree.private]
        by_spread = zip(spreads.values(), settled.spreads, strict=True)
        for leaves, partition in [*_by_holders(plain, settled.plain), *by_spread]:
            written += cut_leaves(tree, leaves, partition, shards, views)
        written.sort(key=lambda part: (part.leaf, part.box))
        # 4. The structure with a number, or chunks, in the place of each leaf that this rank writes.
        numbers: dict[int, list[int]] = {}
        for number, part in enumerate(written):
            numbers.setdefault(part.leaf, []).append(number)
        nodes = {leaf: _node(of, written, tree.leaves[leaf], shards.get(leaf)) for leaf, of in numbers.items()}
        name = name_written if settled.same_names and not self._group.is_coordinator else name_all
        structure = name(tree.structure, lambda leaf: nodes.get(leaf, ABSENT))
        return _Division(signature, tuple(written), structure, _kinds(tree, shards))

    def _settle(
        self,
        tree: StateTree,
        names: Sequence[str],
        plain: Sequence[int],
        spreads: Sequence[Sequence[int]],
        shards: Mapping[int, Shard | None],
        save_id: str,
    ) -> Settlement:
        """Agree with the other ranks, unless they have answered the same question before."""
        if self._group.is_alone:
            _check_complete(tree, shards, self._has_chunks)
        entries = (
            [_entry(names[leaf], tree.leaves[leaf]) for leaf in plain],
            [
                [e for leaf in spread for e in _entries(names[leaf], tree.leaves[leaf], shards[leaf])]
                for spread in spreads
            ],
        )
        own_outline = outline(tree.structure, tree.private)
        # A rank's PerRank values and the types of its objects may change on that rank alone: no other rank would come.
        if self._settled is None or self._settled.entries != entries:
            values = {names[leaf]: tree.leaves[leaf] for leaf in plain}
            settlement = self._agreement.settle(save_id, *entries, lambda: digests_of(values), own_outline)
            self._settled = _Settled(entries, own_outline, settlement)
        settled = self._settled
        # The same names in other containers: no rank was asked, so this rank names everything itself.
        return settled.settlement if own_outline == settled.outline else replace(settled.settlement, same_names=False)


def _written(part: WrittenLeaf, tree: StateTree, views: _Views, made: dict[tuple[int, Any], torch.Tensor]) -> Any:
    """Return what is written of a leaf: its value, or some rows of a tensor.

    Args:
        made: the rows that were made already; is added to.

    Raises:
        UnstageableError: the tensor has no memory for these rows.
    """
    value = views[part.leaf][part.box] if part.leaf in views else tree.leaves[part.leaf]
    if part.rows is None:
        return value
    key = id(value), part.rows
    if key not in made:
        try:
            made[key] = value.detach().narrow(0, part.rows[0], part.rows[1] - part.rows[0])
        except RuntimeError as error:  # its storage was resized
            raise UnstageableError(tree.name(part.leaf), problem_of(value) or str(error)) from error
    return made[key]


def _check_complete(tree: StateTree, shards: Mapping[int, Shard | None], has_chunks: bool) -> None:
    """Check that a rank that saves for itself has all of each tensor, as the format needs it.

    Raises:
        UnstageableError: a tensor of which other ranks have the rest; or one in several boxes.
    """
    for leaf, shard in shards.items():
        if not is_complete(shard):
            raise UnstageableError(
                tree.name(leaf),
                f"is a {_kind_name(tree.leaves[leaf])} of which other ranks have the rest, and this rank saves alone: "
                "let the ranks save together (ranks.together: auto or true, and init_process_group() before the "
                "Checkpointer is made), or save tensor.full_tensor() or tensor.to_local()",
            )
        if not has_chunks and shard is not None and len(shard.boxes) > 1:
            raise UnstageableError(
                tree.name(leaf),
                f"is a {_kind_name(tree.leaves[leaf])} in {len(shard.boxes)} parts, and this format stores whole tensors "
                "only: set persistence.format to dcp, or save the whole tensor",
            )


def _kind_name(tensor: torch.Tensor) -> str:
    return (
        type(tensor).__name__ if type(tensor) not in PLAIN_TENSORS else "CheckpointableTensor (it has a global_shape)"
    )


def _sharded_leaves(tree: StateTree) -> list[int]:
    return [number for number, leaf in enumerate(tree.leaves) if is_sharded(leaf)] if tree.has_shards else []


def _signature(tree: StateTree, views: _Views) -> tuple[Any, ...]:
    """Return what the division depends on: everything but where the tensors are, and what is in them.

    Args:
        views: this rank's memory of each sharded leaf.
    """
    leaves = tree.leaves
    kinds = list(map(type, leaves))
    if views:
        held = [x for leaf, x in enumerate(leaves) if leaf not in views and isinstance(x, torch.Tensor)]
        held += [view for some in views.values() for view in some]
    else:
        held = leaves if PLAIN_TENSORS.issuperset(kinds) else [x for x in leaves if isinstance(x, torch.Tensor)]
    try:
        sizes: list[Any] = list(map(_Tensor.size, held))
        strides: list[Any] = list(map(_Tensor.stride, held))
        addresses: list[int] = list(map(_Tensor.data_ptr, held))
    except (RuntimeError, NotImplementedError):  # sparse, nested and the like have none
        sizes = [None if x.is_nested else x.size() for x in held]
        strides = [x.stride() if is_stored_raw(x) else None for x in held]
        addresses = list(map(_address, held))
    dtypes = [tensor.dtype for tensor in held]
    places = [(leaf, shape_of(leaves[leaf]), leaves[leaf].dtype, spread_of(leaves[leaf])) for leaf in views]
    return tree.structure, tree.odd_keys, tree.private, kinds, sizes, dtypes, strides, places, _ties(addresses)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr() if is_stored_raw(tensor) else 0
    except RuntimeError:  # a fake tensor; the plan refuses it
        return 0


def _ties(addresses: Sequence[int]) -> list[int]:
    """Return for each tensor the first one at the same address: what is tied to what. Empty if nothing is tied."""
    if len(set(addresses)) == len(addresses):
        return []
    first: dict[int, int] = {}
    return [first.setdefault(address or -number - 1, number) for number, address in enumerate(addresses)]


def _entry(name: str, value: Any) -> LeafEntry:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return LeafEntry(name, name_of(value.dtype), shape_of(value))
    return LeafEntry(name, "object")


def _entries(name: str, tensor: torch.Tensor, shard: Shard | None) -> list[LeafEntry]:
    """Make one entry for each box; if this rank has none, one without offsets."""
    assert shard is not None
    dtype = name_of(tensor.dtype)
    if not shard.boxes:
        return [LeafEntry(name, dtype, shard.shape)]
    return [LeafEntry(name, dtype, shard.shape, box.offsets, box.lengths) for box in shard.boxes]


def _by_holders(leaves: Sequence[int], partitions: Sequence[Partition]) -> list[tuple[list[int], Partition]]:
    """Group the leaves that the same ranks hold, so that all of these ranks cut the same leaves in the same order."""
    groups: dict[int, tuple[list[int], Partition]] = {}
    for leaf, partition in zip(leaves, partitions, strict=True):
        groups.setdefault(partition.holders, ([], partition))[0].append(leaf)
    return list(groups.values())


def _node(numbers: Sequence[int], written: Sequence[WrittenLeaf], value: Any, shard: Shard | None) -> Node:
    """Make the node of the structure that stands for a leaf: an item's number, or the chunks that the leaf is stored in.

    Args:
        numbers: positions in ``written`` of what this rank writes of the leaf. These are the numbers of the items.
        value: the leaf.
        shard: what this rank holds of it; None if it is not sharded.
    """
    is_a_part = shard is not None and not shard.is_empty and not shard.is_whole
    if len(numbers) == 1 and written[numbers[0]].rows is None and not is_a_part:
        return numbers[0]  # one item holds all of the leaf
    shape = shape_of(value)
    chunks = []
    for number in numbers:
        part = written[number]
        offsets = list(shard.boxes[part.box].offsets if shard is not None else (0,) * len(shape))
        if part.rows is not None:
            offsets[0] += part.rows[0]
        chunks.append([offsets, number])
    return ["chunks", list(shape), chunks]


def _kinds(tree: StateTree, shards: Mapping[int, Shard | None]) -> frozenset[tuple[str, int]]:
    return frozenset(
        (name_of(value.dtype), len(shape_of(value)))
        for leaf, value in enumerate(tree.leaves)
        if isinstance(value, torch.Tensor) and (leaf in shards or is_stored_raw(value))
    )
