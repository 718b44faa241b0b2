"""Which part of a state this rank writes: from all leaves that it has to those, or the rows of those, that are its share.

    PerRank values          all of them
    a DTensor               the local shard; where other ranks hold the same one, a part of it
    anything else           it is the same on all ranks: the tensors are dealt out by size, objects go to rank 0

What several ranks hold is cut into runs of about the same number of bytes, one for each of them; a large tensor is cut
between rows, and is then stored in chunks, which every reader of the format knows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stager.ranks.agreement import ALONE, Agreement, Entry, Holding
from stager.ranks.job import Job
from stager.ranks.shards import Shard, is_sharded, local_of, shard_of, spread_of
from stager.snapshot.flatten import Flat
from workers.errors import UnstageableError
from workers.structure import ABSENT, Node, fqn

_CUT_BYTES = 1 << 20  # smaller pieces of a tensor are not worth an item of their own
_COMPARED_BYTES = 64 << 10
_COMPARED_DEPTH = 4
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
_Tensor: Any = torch.Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """What this rank writes of a leaf.

    Attributes:
        leaf: number in the whole state.
        rows: first and last but one, of what this rank has; None: all of it.
        sharded: it is a DTensor.
    """

    leaf: int
    rows: tuple[int, int] | None
    sharded: bool


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


class ShareTaker:
    """Takes this rank's share of states. The last one's division is kept.

    Args:
        job: of which this rank is one.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._agreement = None if job.board is None else Agreement(job)
        self._known: _Known | None = None

    def take(self, flat: Flat) -> Flat:
        """The leaves that this rank writes. Called by every rank: where the structure is new, it waits for all.

        Raises:
            UnstageableError: a DTensor that cannot be stored; two leaves of one name.
            RankFailedError, InconsistentRanksError: see :class:`Agreement`.
        """
        sharded = _sharded_leaves(flat)
        if self._agreement is None and not sharded:
            return flat
        signature = _signature(flat, sharded)
        if self._known is None or self._known.signature != signature:
            self._known = self._divide(flat, sharded, signature)
        known = self._known
        leaves = [_tensor(flat.leaves[part.leaf], part) for part in known.parts]
        return Flat(leaves, known.structure, flat.odd_keys, kinds=known.kinds)

    def forget(self) -> None:
        self._known = None

    def _divide(self, flat: Flat, sharded: Sequence[int], signature: tuple[Any, ...]) -> _Known:
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
            if shard is not None:
                groups.setdefault(shard.spread, []).append(leaf)
            elif leaf not in shards and leaf not in flat.private:
                plain.append(leaf)
        holdings = self._settle(flat, names, plain, list(groups.values()), shards)
        parts: dict[int, _Part] = {leaf: _Part(leaf, None, False) for leaf in flat.private}
        for leaves, holding in [*_by_holding(plain, holdings[0]), *zip(groups.values(), holdings[1], strict=True)]:
            for part in _deal(flat, leaves, holding, shards):
                parts[part.leaf] = part
        for leaf, shard in shards.items():
            if shard is not None and not math.prod(shard.lengths) and not (shard.is_first and leaf in parts):
                parts.pop(leaf, None)  # nothing of it is here
        written = tuple(parts[leaf] for leaf in sorted(parts))
        numbers = {part.leaf: number for number, part in enumerate(written)}
        structure = _structure(flat.structure, parts, numbers, flat, shards)
        return _Known(signature, written, structure, _kinds(flat))

    def _settle(
        self,
        flat: Flat,
        names: Sequence[str],
        plain: Sequence[int],
        groups: Sequence[Sequence[int]],
        shards: dict[int, Shard | None],
    ) -> tuple[list[Holding], list[Holding]]:
        if self._agreement is None:
            return [ALONE] * len(plain), [ALONE] * len(groups)
        return self._agreement.settle(
            [_plain_entry(names[leaf], flat.leaves[leaf]) for leaf in plain],
            [[_shard_entry(names[leaf], flat.leaves[leaf], shards[leaf]) for leaf in group] for group in groups],
            {names[leaf]: value for leaf in plain if (value := _digest_of(flat.leaves[leaf])) is not None},
        )


def _sharded_leaves(flat: Flat) -> list[int]:
    leaves = flat.leaves
    kinds = set(map(type, leaves))
    if not any(hasattr(kind, "__tensor_flatten__") for kind in kinds - _PLAIN_TYPES):
        return []
    return [number for number, leaf in enumerate(leaves) if is_sharded(leaf)]


def _signature(flat: Flat, sharded: Sequence[int]) -> tuple[Any, ...]:
    """What the division depends on: everything but where the tensors are, and what is in them."""
    leaves = flat.leaves
    kinds = list(map(type, leaves))
    numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[number] for number in numbers]
    spreads = [spread_of(leaves[number]) for number in sharded]
    locals_ = {number: local_of(leaves[number]) for number in sharded}
    held = [locals_.get(number, tensor) for number, tensor in zip(numbers, tensors, strict=True)]
    strides = [tensor.stride() if tensor.layout is torch.strided else None for tensor in held]
    return (
        flat.structure,
        flat.odd_keys,
        flat.private,
        kinds,
        list(map(_Tensor.size, tensors)),
        [tensor.dtype for tensor in tensors],
        strides,
        sharded,
        spreads,
        _ties(held),
    )


def _ties(tensors: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor the first one that is at the same address: what is tied to what."""
    first: dict[Any, int] = {}
    return [
        first.setdefault(tensor.data_ptr() or -number - 1, number) if tensor.layout is torch.strided else number
        for number, tensor in enumerate(tensors)
    ]


def _plain_entry(name: str, value: Any) -> Entry:
    if isinstance(value, torch.Tensor):
        return Entry(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
    return Entry(name, "object")


def _shard_entry(name: str, value: torch.Tensor, shard: Shard | None) -> Entry:
    assert shard is not None
    dtype = str(value.dtype).removeprefix("torch.")
    return Entry(name, dtype, shard.shape, shard.offsets, shard.lengths)


def _digest_of(value: Any) -> str | None:
    """Of what is small and can be compared: small host tensors, and values of Python's own types."""
    if isinstance(value, torch.Tensor):
        if not value.is_cpu or type(value) not in _PLAIN_TYPES or value.layout is not torch.strided:
            return None
        if value.is_quantized or not 0 < value.nbytes <= _COMPARED_BYTES:
            return None
        data = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
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
    groups: dict[Holding, list[int]] = {}
    for leaf, holding in zip(leaves, holdings, strict=True):
        groups.setdefault(holding, []).append(leaf)
    return [(group, holding) for holding, group in groups.items()]


def _deal(flat: Flat, leaves: Sequence[int], holding: Holding, shards: dict[int, Shard | None]) -> list[_Part]:
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
        sharded = unit.leaves[0] in shards
        if not unit.nbytes:  # an object, or an empty tensor
            rows = (0, 1) if holding.position == 0 else (0, 0)
        elif unit.cuttable and holding.total > 1:
            row_nbytes = unit.nbytes // unit.shape[0]
            first = _row(low, start, row_nbytes, unit.shape[0])
            last = unit.shape[0] if is_last else _row(high, start, row_nbytes, unit.shape[0])
            rows = (first, last)
            if (first, last) != (0, unit.shape[0]):
                if first < last:
                    parts += [_Part(leaf, rows, sharded) for leaf in unit.leaves]
                continue
        else:
            middle = (start + end) // 2
            rows = (0, 1) if low <= middle < high or (is_last and middle >= high) else (0, 0)
        if rows[0] < rows[1]:
            parts += [_Part(leaf, None, sharded) for leaf in unit.leaves]
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


def _units(flat: Flat, leaves: Sequence[int], shards: dict[int, Shard | None]) -> list[_Unit]:
    units: dict[Hashable, _Unit] = {}
    for leaf in leaves:
        value = flat.leaves[leaf]
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
            units[leaf] = _Unit([leaf], (), 0, cuttable=False)
            continue
        tensor = local_of(value) if leaf in shards else value  # type: ignore[arg-type]
        nbytes = tensor.numel() * tensor.dtype.itemsize
        key: Hashable = leaf
        if nbytes and not tensor.is_meta:
            offsets = shards[leaf].offsets if leaf in shards else ()  # type: ignore[union-attr]
            key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, offsets, tuple(value.shape)
        if key in units:
            units[key].leaves.append(leaf)
            continue
        cuttable = nbytes >= 2 * _CUT_BYTES and tensor.dim() > 0 and tensor.is_contiguous() and not tensor.is_meta
        units[key] = _Unit([leaf], tuple(tensor.shape), nbytes, cuttable)
    return list(units.values())


def _structure(
    node: Node, parts: dict[int, _Part], numbers: dict[int, int], flat: Flat, shards: dict[int, Shard | None]
) -> Node:
    if type(node) is int:
        part = parts.get(node)
        if part is None:
            return ABSENT
        return _leaf_node(part, numbers[node], flat, shards.get(node))
    position = 1 if node[0] == "list" else 2
    children = [_structure(child, parts, numbers, flat, shards) for child in node[position]]
    return [*node[:position], children, *node[position + 1 :]]


def _leaf_node(part: _Part, number: int, flat: Flat, shard: Shard | None) -> Node:
    first = part.rows[0] if part.rows is not None else 0
    if shard is None:
        if part.rows is None:
            return number
        shape = list(flat.leaves[part.leaf].shape)
        return ["chunks", shape, [[[first] + [0] * (len(shape) - 1), number]]]
    if part.rows is None and shard.shape == shard.lengths:
        return number
    offsets = list(shard.offsets)
    if offsets:
        offsets[0] += first
    return ["chunks", list(shard.shape), [[offsets, number]]]


def _tensor(value: Any, part: _Part) -> Any:
    tensor = local_of(value) if part.sharded else value
    if part.rows is not None:
        first, last = part.rows
        return tensor.detach().narrow(0, first, last - first)
    return tensor


def _kinds(flat: Flat) -> frozenset[tuple[str, int]]:
    return frozenset(
        (str(leaf.dtype).removeprefix("torch."), leaf.dim())
        for leaf in flat.leaves
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_quantized
    )
