"""What each rank contributes to a checkpoint, and how the contributions are merged into one layout.

1. Each rank lays out its own files. Its structure says which leaves it writes: whole, in chunks, or not at all
   (``structure.ABSENT``). Rank 0 names every leaf; other ranks may leave out those that they do not write.
2. Files and items get new numbers: the tensors of all ranks first, then the objects of all ranks.
3. The structures are overlaid: each leaf comes from the rank that writes it; chunks from several ranks become one list.
4. The result is checked as a whole: no leaf is missing, and chunks fill their tensors.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stager.workers.checkpoint.documents.receipt import Receipt, receipt_name
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, PlanCache, partition_once
from stager.workers.checkpoint.layout.layout_check import check_tiling, shared_too_often
from stager.workers.checkpoint.layout.structure import (
    ABSENT,
    Chunks,
    Key,
    Node,
    Path,
    absent,
    describe,
    fqn,
    leaves,
    map_leaves,
    recipe_path,
)
from stager.workers.checkpoint.layout.tensor_node import TensorNode, is_tensor_node, open_tensor
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import CorruptCheckpointError, InconsistentRanksError
from stager.workers.wording import first_of

_SHOWN_NAMES = 3

_OfRank = tuple[int, Node]

Hashes = tuple[tuple[str, ...], ...]
"""For each item, the hashes of its segments."""


@dataclass(frozen=True, slots=True)
class RankContribution:
    """What one rank contributes: spec and layout from its save record, and the receipts of all its parts, in order."""

    spec: SaveSpec
    layout: Layout
    receipts: tuple[Receipt, ...]

    def hashes(self, partial: str) -> Hashes:
        """Return the hashes of each item's segments, from the receipts. ``partial`` is for error messages.

        Raises:
            CorruptCheckpointError: the receipts are not of this layout.
        """
        layout = self.layout
        # Compare counts first: a hostile record may claim more segments than fit into memory.
        expected = layout.num_segments()
        actual = sum(len(receipt.hashes) for receipt in self.receipts)
        if actual != expected:
            raise CorruptCheckpointError(
                partial,
                f"its receipts list {actual} hashes, and the rank wrote {expected} segments, each of which has one",
            )
        parts = partition_once(layout, len(self.receipts), self.spec.whole_bytes)
        if all(len(receipt.hashes) == len(part) for receipt, part in zip(self.receipts, parts, strict=True)):
            if expected == len(layout.items):  # one segment each, and parts are in the order of the items
                return tuple(zip(itertools.chain.from_iterable(receipt.hashes for receipt in self.receipts)))
        hashes: list[list[str]] = [[] for _ in range(len(layout.items))]
        for receipt, part in zip(self.receipts, parts, strict=True):
            if len(receipt.hashes) != len(part):
                raise CorruptCheckpointError(
                    os.path.join(partial, receipt_name(receipt.rank, receipt.part, receipt.num_parts)),
                    f"has {len(receipt.hashes)} hashes for {len(part)} segments",
                )
            for segment, value in zip(part, receipt.hashes, strict=True):
                hashes[segment.index].append(value)
        return tuple(map(tuple, hashes))


def merge(contributions: Sequence[RankContribution], partial: str) -> tuple[Layout, Hashes]:
    """Merge the contributions of all ranks, in their order. Returns the checkpoint's layout, and the hashes of its items.

    Raises:
        InconsistentRanksError: the ranks did not save the same state.
        CorruptCheckpointError: receipts do not match their contribution.
    """
    if len(contributions) == 1:
        return contributions[0].layout, contributions[0].hashes(partial)
    layouts = [contribution.layout for contribution in contributions]
    sizes = {layout.segment_bytes for layout in layouts}
    if len(sizes) > 1:
        raise InconsistentRanksError(f"persistence.segment_bytes differs between ranks: {sorted(sizes)}")
    files, items, numbers = _number(layouts)
    structure = overlay(
        [_renumbered(layout.structure, of_rank) for layout, of_rank in zip(layouts, numbers, strict=True)]
    )
    hashes: list[tuple[str, ...]] = [()] * len(items)
    for contribution, of_rank in zip(contributions, numbers, strict=True):
        for number, values in zip(of_rank, contribution.hashes(partial), strict=True):
            hashes[number] = values
    # Only the contribution of this process's own rank has templates. With them the commit runs without torch.
    templates = next((layout.cache.templates for layout in layouts if layout.cache.templates is not None), None)
    num_tensors = sum(item.kind == "tensor" for item in items)
    layout = Layout(files, Items.of(items), structure, sizes.pop()).with_cache(PlanCache(num_tensors, templates))
    _check_whole(layout)
    return layout, tuple(hashes)


def _number(layouts: Sequence[Layout]) -> tuple[tuple[FileSpec, ...], tuple[Item, ...], list[list[int]]]:
    """Number the files and items of all ranks: first the tensors of each rank, then the objects and trailers of each.

    Returns the files, the items, and for each rank the new numbers of its items.
    """
    files: list[FileSpec] = []
    items: list[Item] = []
    numbers = [[0] * len(layout.items) for layout in layouts]
    for of_tensors in (True, False):
        for layout, of_rank in zip(layouts, numbers, strict=True):
            new_files: dict[int, int] = {}
            for index, item in enumerate(layout.items):
                if (item.kind == "tensor") != of_tensors:
                    continue
                if item.file not in new_files:
                    new_files[item.file] = len(files)
                    files.append(layout.files[item.file])
                of_rank[index] = len(items)
                items.append(replace(item, file=new_files[item.file], slab_offset=-1))
    return tuple(files), tuple(items), numbers


def _renumbered(structure: Node, numbers: list[int]) -> Node:
    """Return a rank's structure with the numbers that its items have in the whole."""

    def leaf(found: int | Chunks) -> Node:
        if isinstance(found, Chunks):
            return Chunks(found.shape, tuple((at, numbers[index]) for at, index in found.parts)).to_node()
        return numbers[found]

    return map_leaves(structure, leaf)


def overlay(nodes: Sequence[Node]) -> Node:
    """Overlay the structures of all ranks, in their order. A leaf that no rank writes stays absent.

    Raises:
        InconsistentRanksError: two ranks have different kinds of nodes in one place.
    """
    return _lay_over(list(enumerate(nodes)), ())


def _lay_over(nodes: Sequence[_OfRank], path: Path) -> Node:
    there = [(rank, node) for rank, node in nodes if node is not ABSENT]
    if not there:
        return ABSENT
    first = there[0][1]
    if len(there) == 1 and (type(first) is int or first[0] == "chunks"):
        return first
    kinds = {_kind(node) for _, node in there}
    if len(kinds) > 1 or "value" in kinds:
        what = "; ".join(f"{_kind(node)} on rank {rank}" for rank, node in there[:4])
        raise InconsistentRanksError(
            f"{describe(path)} is not the same on all ranks: {what}; give all ranks states of the same structure"
        )
    if first[0] == "chunks":
        return _chunks([(rank, Chunks.from_node(node)) for rank, node in there], path).to_node()
    if first[0] == "list":
        length = max(len(node[1]) for _, node in there)
        columns = [[(rank, node[1][i]) for rank, node in there if i < len(node[1])] for i in range(length)]
        return ["list", [_lay_over_column(column, (*path, i)) for i, column in enumerate(columns)]]
    by_key: dict[Key, list[_OfRank]] = {}
    for rank, node in there:
        for key, child in zip(node[1], node[2], strict=True):
            by_key.setdefault(key, []).append((rank, child))
    children = [_lay_over_column(column, (*path, key)) for key, column in by_key.items()]
    if first[0] != "odict":
        return [first[0], list(by_key), children]
    metadata = next((node[3] for _, node in there if node[3] is not None), None)
    return ["odict", list(by_key), children, metadata]


def _tensor(there: Sequence[_OfRank], path: Path) -> Node:
    """Overlay a leaf with flags. Flags, and the recipe, come from the first rank that has them."""
    opened = [(rank, open_tensor(node)) for rank, node in there]
    recipes = [(rank, one.recipes[0]) for rank, one in opened if one.recipes]
    inner = _lay_over([(rank, one.node) for rank, one in opened], path)
    flags = next((one.flags for _, one in opened if one.flags), {})
    return TensorNode(inner, flags, [_lay_over(recipes, recipe_path(path))] if recipes else []).to_node()


def _lay_over_column(column: list[_OfRank], path: Path) -> Node:
    if len(column) == 1:
        return column[0][1]
    return _tensor(column, path) if any(is_tensor_node(node) for _, node in column) else _lay_over(column, path)


def _chunks(parts: list[tuple[int, Chunks]], path: Path) -> Chunks:
    shapes = {chunks.shape for _, chunks in parts}
    if len(shapes) > 1:
        what = "; ".join(f"{chunks.shape} on rank {rank}" for rank, chunks in parts[:4])
        raise InconsistentRanksError(f"{describe(path)} has different shapes on the ranks: {what}")
    return Chunks(shapes.pop(), tuple(part for _, chunks in parts for part in chunks.parts))


def _kind(node: Node) -> str:
    if type(node) is int:
        return "value"
    return {"chunks": "a tensor in chunks", "list": "a list"}.get(node[0], f"a mapping ({node[0]})")


def _check_whole(layout: Layout) -> None:
    """Check what the contributions only promise together; ``layout_check.check_layout`` would refuse the result otherwise.

    Raises:
        InconsistentRanksError: no rank wrote a leaf; or chunks of a tensor do not fill it, differ in dtype, or are chunks of
            too many tensors.
    """
    lost = list(absent(layout.structure))
    if lost:
        raise InconsistentRanksError(
            _namesake(layout.structure, lost)
            or f"{first_of(list(map(describe, lost)), _SHOWN_NAMES)}: no rank wrote it, because each rank expects another "
            "to; give all ranks states of the same keys"
        )
    wholes: dict[Chunks, Path] = {}
    for path, chunks in leaves(layout.structure):
        if not isinstance(chunks, Chunks) or chunks in wholes:  # a whole item; or tied on every rank
            continue
        wholes[chunks] = path
        items = [layout.items[index] for _, index in chunks.parts]
        if len({item.dtype for item in items}) > 1:
            raise InconsistentRanksError(f"{describe(path)} has different dtypes on the ranks")
        try:
            check_tiling([(at, item.shape) for (at, _), item in zip(chunks.parts, items, strict=True)], chunks.shape)
        except ValueError as error:
            text = _namesake(layout.structure, [path]) or f"{describe(path)}: {error}"
            raise InconsistentRanksError(text) from error
    if (shared := shared_too_often(wholes)) is not None:
        of = [describe(path) for chunks, path in wholes.items() if any(index == shared for _, index in chunks.parts)]
        raise InconsistentRanksError(
            f"{first_of(of, _SHOWN_NAMES)} are one tensor on one rank, and not on the others; what is tied has to be "
            "tied on all ranks"
        )


def _namesake(structure: Node, broken: Sequence[Path]) -> str | None:
    """Say which key path has the name of a leaf that is not whole: ranks take leaves of one name for one value."""
    by_name: dict[str, list[Path]] = {}
    for path in [*absent(structure), *(path for path, _ in leaves(structure))]:
        by_name.setdefault(fqn(path), []).append(path)
    for path in broken:
        for other in by_name[fqn(path)]:
            if other != path:
                return (
                    f"{describe(path)} and {describe(other)} have the same name in a checkpoint, {fqn(path)}, and are on "
                    "different ranks, which take them for one value: rename a key, or give all ranks the same keys"
                )
    return None
