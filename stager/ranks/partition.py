"""Which part of a state this rank writes: from all leaves that it has to those, or the rows of those, that are its share.

    PerRank values          all of them
    a DTensor               the local shard; where other ranks hold the same one, a part of it
    anything else           it is the same on all ranks: the tensors are dealt out by size, objects go to rank 0

What several ranks hold is cut into runs of about the same number of bytes, one for each of them; a large tensor is cut
between rows, and is then stored in chunks, which every reader of the format knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stager.ranks.agreement import ALONE, Agreement, Entry, Holding, Settled
from stager.ranks.naming import name_all, name_written, outline
from stager.ranks.rank_group import RankGroup
from stager.state.flatten import PLAIN_TENSORS, StateTree
from stager.state.shards import Shard, is_sharded, local_of, locals_of, shard_of, spread_of
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.structure import ABSENT, Node, fqn
from stager.workers.errors import UnstageableError

_CUT_BYTES = 1 << 20  # smaller pieces of a tensor are not worth an item of their own
_COMPARED_BYTES = 64 << 10
_STRETCHES = 16  # that are compared of a larger tensor
_COMPARED_DEPTH = 4
_Tensor: Any = torch.Tensor

_Question = tuple[list[Entry], list[list[Entry]]]


@dataclass(frozen=True, slots=True)
class _Part:
    """What this rank writes of a leaf.

    Attributes:
        leaf: number in the whole state.
        rows: first and last but one, of what this rank has; None: all of it.
    """

    leaf: int
    rows: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Known:
    """What was worked out for a state: what it depends on, and the result."""

    signature: tuple[Any, ...]
    parts: tuple[_Part, ...]
    structure: Node
    kinds: frozenset[tuple[str, int]]


@dataclass(slots=True)
class _Unit:
    """Leaves that are the same memory seen the same way (tied): they are dealt as one.

    Attributes:
        leaves: their numbers.
        shape: of what this rank has.
        nbytes: of the same.
        cuttable: between rows.
    """

    leaves: list[int]
    shape: tuple[int, ...]
    nbytes: int
    cuttable: bool


class Partitioner:
    """Takes this rank's share of states. The last one's division is kept.

    Args:
        group: of which this rank is one.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._agreement = None if group.rendezvous is None else Agreement(group)
        self._known: _Known | None = None
        self._settled: tuple[_Question, str, Settled] | None = None

    def take(self, flat: StateTree, occasion: str) -> StateTree:
        """The leaves that this rank writes. Called by every rank: where the structure is new, it waits for all.

        Args:
            occasion: the save's id.

        Raises:
            UnstageableError: a DTensor that cannot be stored; two leaves of one name.
            RankFailedError, InconsistentRanksError: see :class:`Agreement`.
        """
        sharded = _sharded_leaves(flat)
        if self._agreement is None and not sharded:
            return flat
        here = flat.leaves
        if sharded:
            here = list(here)
            for leaf, local in zip(sharded, locals_of([here[leaf] for leaf in sharded]), strict=True):
                # One without elements has its shape here, too.
                here[leaf] = local if here[leaf].numel() else torch.empty(tuple(here[leaf].shape), dtype=local.dtype)
        signature = _signature(flat, sharded, here)
        if self._known is None or self._known.signature != signature:
            self._known = self._divide(flat, sharded, signature, occasion)
        known = self._known
        leaves = [
            here[part.leaf]
            if part.rows is None
            else here[part.leaf].detach().narrow(0, part.rows[0], part.rows[1] - part.rows[0])
            for part in known.parts
        ]
        return StateTree(leaves, known.structure, flat.odd_keys, kinds=known.kinds)

    def forget(self) -> None:
        self._known = self._settled = None

    def _divide(self, flat: StateTree, sharded: Sequence[int], signature: tuple[Any, ...], occasion: str) -> _Known:
        flat.check_names()
        for leaf in sharded:
            if leaf in flat.private:
                raise UnstageableError(
                    flat.name(leaf),
                    "is a DTensor in PerRank: it belongs to all ranks of its mesh; take it out of there",
                )
        shards = {leaf: shard_of(flat.leaves[leaf], flat.name(leaf)) for leaf in sharded}
        names = [fqn(path) for path in flat.paths]
        groups: dict[Hashable, list[int]] = {}
        plain: list[int] = []
        for leaf in sorted(range(len(names)), key=names.__getitem__):
            shard = shards.get(leaf)
            if shard is not None and 0 not in shard.shape:
                groups.setdefault(shard.spread, []).append(leaf)
            elif (shard is not None or leaf not in shards) and leaf not in flat.private:
                plain.append(leaf)  # or a DTensor without elements, which are the same everywhere
        settled = self._settle(flat, names, plain, list(groups.values()), shards, occasion)
        parts: dict[int, _Part] = {leaf: _Part(leaf, None) for leaf in flat.private}
        for leaves, holding in [*_by_holding(plain, settled.plain), *zip(groups.values(), settled.groups, strict=True)]:
            for part in _deal(flat, leaves, holding, shards):
                parts[part.leaf] = part
        for leaf, shard in shards.items():
            if shard is not None and 0 in shard.lengths and 0 not in shard.shape:
                parts.pop(leaf, None)  # nothing of it is here
        written = tuple(parts[leaf] for leaf in sorted(parts))
        numbers = {part.leaf: number for number, part in enumerate(written)}

        def node_of(leaf: int) -> Node:
            return _leaf_node(parts[leaf], numbers[leaf], flat, shards.get(leaf)) if leaf in parts else ABSENT

        name = name_written if settled.alike and not self._group.is_coordinator else name_all
        return _Known(signature, written, name(flat.structure, node_of), _kinds(flat))

    def _settle(
        self,
        flat: StateTree,
        names: Sequence[str],
        plain: Sequence[int],
        groups: Sequence[Sequence[int]],
        shards: dict[int, Shard | None],
        occasion: str,
    ) -> Settled:
        if self._agreement is None:
            for leaf, shard in shards.items():
                if shard is None or (shard.lengths != shard.shape and 0 not in shard.shape):
                    raise UnstageableError(
                        names[leaf],
                        "is a DTensor of which other ranks have the rest, and this one saves for itself: let them save "
                        "together (ranks.together, and init_process_group() before the Checkpointer is made), or save its "
                        "full or local tensor",
                    )
            return Settled([ALONE] * len(plain), [ALONE] * len(groups), alike=False)
        entries = [_plain_entry(names[leaf], flat.leaves[leaf]) for leaf in plain]
        of_groups = [[_shard_entry(names[leaf], flat.leaves[leaf], shards[leaf]) for leaf in group] for group in groups]
        question, own_outline = (entries, of_groups), outline(flat.structure, flat.private)
        # What a rank has for itself (``PerRank``), and what its objects are, may change there alone: no other would come.
        if self._settled is None or self._settled[0] != question:
            values = {names[leaf]: value for leaf in plain if (value := _digest_of(flat.leaves[leaf])) is not None}
            answer = self._agreement.settle(occasion, entries, of_groups, values, own_outline)
            self._settled = question, own_outline, answer
        _, known_outline, settled = self._settled
        # Other containers of the same names: nobody was asked, so nobody else is relied on to name what is in them.
        return settled if own_outline == known_outline else replace(settled, alike=False)


def _is_bytes(tensor: torch.Tensor) -> bool:
    """Whether it is stored as such, and not as a pickled object."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)


def _sharded_leaves(flat: StateTree) -> list[int]:
    leaves = flat.leaves
    kinds = set(map(type, leaves))
    kinds = {kind for kind in kinds - PLAIN_TENSORS if hasattr(kind, "__tensor_flatten__")}
    if not kinds:
        return []
    return [number for number, leaf in enumerate(leaves) if type(leaf) in kinds and is_sharded(leaf)]


def _signature(flat: StateTree, sharded: Sequence[int], here: Sequence[Any]) -> tuple[Any, ...]:
    """What the division depends on: everything but where the tensors are, and what is in them.

    Args:
        here: the leaves, with local tensors in the place of DTensors.
    """
    leaves = flat.leaves
    kinds = list(map(type, leaves))
    tensors = leaves if PLAIN_TENSORS.issuperset(kinds) else [x for x in leaves if isinstance(x, torch.Tensor)]
    held = tensors if not sharded and tensors is leaves else [x for x in here if isinstance(x, torch.Tensor)]
    try:
        sizes: list[Any] = list(map(_Tensor.size, tensors))
        strides: list[Any] = list(map(_Tensor.stride, held))
        addresses: list[int] = list(map(_Tensor.data_ptr, held))
    except (RuntimeError, NotImplementedError):  # sparse, nested and the like have none
        sizes = [None if x.is_nested else x.size() for x in tensors]
        strides = [x.stride() if _is_bytes(x) else None for x in held]
        addresses = [x.data_ptr() if _is_bytes(x) else 0 for x in held]
    return (
        flat.structure,
        flat.odd_keys,
        flat.private,
        kinds,
        sizes,
        [tensor.dtype for tensor in tensors],
        strides,
        sharded,
        [spread_of(leaves[number]) for number in sharded],
        _ties(addresses),
    )


def _ties(addresses: Sequence[int]) -> list[int]:
    """For each tensor the first one that is at the same address: what is tied to what. Empty: nothing is."""
    if len(set(addresses)) == len(addresses):
        return []
    first: dict[int, int] = {}
    return [first.setdefault(address or -number - 1, number) for number, address in enumerate(addresses)]


def _plain_entry(name: str, value: Any) -> Entry:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return Entry(name, name_of(value.dtype), tuple(value.shape))
    return Entry(name, "object")


def _shard_entry(name: str, value: torch.Tensor, shard: Shard | None) -> Entry:
    assert shard is not None
    dtype = name_of(value.dtype)
    return Entry(name, dtype, shard.shape, shard.offsets, shard.lengths)


def _digest_of(value: Any) -> str | None:
    """Of what can be compared: host tensors (of large ones, some stretches), and values of Python's own types."""
    if isinstance(value, torch.Tensor):
        if not value.is_cpu or type(value) not in PLAIN_TENSORS or not _is_bytes(value) or not value.nbytes:
            return None
        flat = value.detach().resolve_conj().resolve_neg()
        if value.nbytes > _COMPARED_BYTES:
            if not flat.is_contiguous():
                return None
            whole, length = flat.view(-1).view(torch.uint8), _COMPARED_BYTES // _STRETCHES
            starts = [(len(whole) - length) * number // (_STRETCHES - 1) for number in range(_STRETCHES)]
            data = torch.cat([whole.narrow(0, start, length) for start in starts])
        else:
            data = flat.contiguous().view(-1).view(torch.uint8)
        return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()
    if not _is_simple(value):
        return None
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _is_simple(value: Any, depth: int = 0) -> bool:
    if type(value) in (list, tuple):
        return (
            depth < _COMPARED_DEPTH and len(value) <= _COMPARED_BYTES and all(_is_simple(e, depth + 1) for e in value)
        )
    return type(value) in (type(None), bool, int, float, complex, str, bytes)


def _by_holding(leaves: Sequence[int], holdings: Sequence[Holding]) -> list[tuple[list[int], Holding]]:
    """What the same ranks hold: all of them deal with the same leaves, in the same order."""
    groups: dict[int, tuple[list[int], Holding]] = {}
    for leaf, holding in zip(leaves, holdings, strict=True):
        groups.setdefault(holding.holders, ([], holding))[0].append(leaf)
    return list(groups.values())


def _deal(flat: StateTree, leaves: Sequence[int], holding: Holding, shards: dict[int, Shard | None]) -> list[_Part]:
    """This rank's run of what ``holding.total`` ranks have."""
    units = _units(flat, leaves, shards)
    total, parts = sum(unit.nbytes for unit in units), []
    low = total * holding.position // holding.total
    high = total * (holding.position + 1) // holding.total
    is_last = holding.position == holding.total - 1
    done = 0
    for unit in units:
        start, end = done, done + unit.nbytes
        done = end
        if not unit.nbytes:  # an object, or an empty tensor
            rows = (0, 1) if holding.position == 0 else (0, 0)
        elif unit.cuttable and holding.total > 1:
            row_nbytes = unit.nbytes // unit.shape[0]
            first = _row(low, start, row_nbytes, unit.shape[0])
            last = unit.shape[0] if is_last else _row(high, start, row_nbytes, unit.shape[0])
            rows = (first, last)
            if (first, last) != (0, unit.shape[0]):
                if first < last:
                    parts += [_Part(leaf, rows) for leaf in unit.leaves]
                continue
        else:
            middle = (start + end) // 2
            rows = (0, 1) if low <= middle < high or (is_last and middle >= high) else (0, 0)
        if rows[0] < rows[1]:
            parts += [_Part(leaf, None) for leaf in unit.leaves]
    return parts


def _row(boundary: int, start: int, row_nbytes: int, num_rows: int) -> int:
    """The row at which a tensor that starts at ``start`` is cut for a boundary between two ranks' bytes.

    Not so near its ends that the piece would not be worth it."""
    row = round((boundary - start) / row_nbytes)
    margin = -(-_CUT_BYTES // row_nbytes)
    if row < margin:
        return 0 if 2 * row < margin or num_rows < 2 * margin else margin
    if num_rows - row < margin:
        return num_rows if 2 * (num_rows - row) < margin or num_rows < 2 * margin else num_rows - margin
    return row


def _units(flat: StateTree, leaves: Sequence[int], shards: dict[int, Shard | None]) -> list[_Unit]:
    units: dict[Hashable, _Unit] = {}
    for leaf in leaves:
        value = flat.leaves[leaf]
        if not isinstance(value, torch.Tensor) or not _is_bytes(value):
            units[leaf] = _Unit([leaf], (), 0, cuttable=False)
            continue
        tensor = local_of(value) if is_sharded(value) else value
        nbytes = tensor.numel() * tensor.dtype.itemsize
        key: Hashable = leaf
        if nbytes and not tensor.is_meta:
            shard = shards.get(leaf)
            offsets = shard.offsets if shard is not None else ()
            key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, offsets, tuple(value.shape)
        if key in units:
            units[key].leaves.append(leaf)
            continue
        cuttable = nbytes >= 2 * _CUT_BYTES and tensor.dim() > 0 and tensor.is_contiguous() and not tensor.is_meta
        units[key] = _Unit([leaf], tuple(tensor.shape), nbytes, cuttable)
    return list(units.values())


def _leaf_node(part: _Part, number: int, flat: StateTree, shard: Shard | None) -> Node:
    first = part.rows[0] if part.rows is not None else 0
    if shard is None:
        if part.rows is None:
            return number
        shape = list(flat.leaves[part.leaf].shape)
        return ["chunks", shape, [[[first] + [0] * (len(shape) - 1), number]]]
    if part.rows is None and (shard.shape == shard.lengths or 0 in shard.shape):
        return number
    offsets = list(shard.offsets)
    if offsets:
        offsets[0] += first
    return ["chunks", list(shard.shape), [[offsets, number]]]


def _kinds(flat: StateTree) -> frozenset[tuple[str, int]]:
    return frozenset(
        (name_of(leaf.dtype), leaf.dim()) for leaf in flat.leaves if isinstance(leaf, torch.Tensor) and _is_bytes(leaf)
    )
