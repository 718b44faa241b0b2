"""What the ranks' shares make together is what the readers of a manifest take, or it is refused before it is committed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from stager.workers.checkpoint.commit.commit import build_manifest
from stager.workers.checkpoint.commit.merge import RankContribution, merge
from stager.workers.checkpoint.documents.manifest import parse_manifest
from stager.workers.checkpoint.documents.receipt import Receipt
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.formats.contract import TensorSpec, TensorSpecs, evenly
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, partition_once
from stager.workers.checkpoint.layout.layout_check import check_layout
from stager.workers.checkpoint.layout.structure import ABSENT, Node
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import CorruptCheckpointError, InconsistentRanksError, StagerError

SAVE_ID = "0123456789abcdef"
NAMES = ["a", "b", "c", "d", "e"]


def _share(rank: int, num_ranks: int, items_of: Sequence[int | None], linked_bytes: int = 0) -> RankContribution:
    """A rank with its row of each of some tensors of shape (number of ranks, 4).

    Args:
        items_of: for each tensor, which item its row is; equal: tied on this rank; None: the tensor is not here.
    """
    num_items = 1 + max((item for item in items_of if item is not None), default=-1)
    laid_out = get_format("dcp").lay_out(
        TensorSpecs.of([TensorSpec((("w",),), ("w",), "float32", (1, 4), (4, 1))] * num_items), rank, evenly(1)
    )
    nodes: list[Node] = [
        ABSENT if item is None else ["chunks", [num_ranks, 4], [[[rank, 0], item]]] for item in items_of
    ]
    layout = Layout(laid_out.files, laid_out.items, ["dict", NAMES[: len(nodes)], nodes], 64 << 20)
    check_layout(layout, of_one_rank=True)
    spec = SaveSpec("/run", 1, SAVE_ID, "dcp", 1, False, 1e9, "0", "2", rank=rank, num_ranks=num_ranks)
    hashes = tuple(f"{number:032x}" for number in range(len(partition_once(layout, 1)[0])))
    return RankContribution(spec, layout, (Receipt(0, 1, SAVE_ID, hashes, 1, 1e9, 1e9, 1e9, linked_bytes, rank=rank),))


def _read(shares: list[RankContribution]) -> None:
    """By way of the manifest: as whoever reads the checkpoint does."""
    layout, hashes = merge(shares, "partial")
    text = build_manifest(shares, layout, hashes, ()).to_bytes()
    assert parse_manifest(text, "manifest.json").layout.items


@pytest.mark.parametrize("num_names", [4, 5])
def test_tied_on_one_rank_only(num_names: int) -> None:
    """Up to so many tensors are taken for what they are."""
    shares = [_share(0, 2, [0] * num_names), _share(1, 2, range(num_names))]
    if num_names == 4:
        _read(shares)
        return
    with pytest.raises(
        InconsistentRanksError, match=r"a, b, c and 2 more are one tensor on one rank.*tied on all ranks"
    ):
        merge(shares, "partial")


def test_tied_on_all_ranks() -> None:
    _read([_share(rank, 3, [0] * 5) for rank in range(3)])


def test_files_of_one_name() -> None:
    shares = [_share(0, 2, [0]), _share(1, 2, [0])]
    (own,) = shares[0].layout.files
    object.__setattr__(shares[1].layout, "files", (FileSpec(own.name, own.nbytes),))
    with pytest.raises(CorruptCheckpointError, match=f"two files are called {own.name}"):
        _read(shares)


def test_a_file_that_is_called_like_the_manifest() -> None:
    shares = [_share(0, 2, [0]), _share(1, 2, [0])]
    object.__setattr__(shares[1].layout, "files", (FileSpec("manifest.json", shares[1].layout.files[0].nbytes),))
    with pytest.raises(CorruptCheckpointError, match=r"two files are called manifest\.json"):
        _read(shares)


def test_receipts_that_have_linked_more_than_there_can_be() -> None:
    with pytest.raises(CorruptCheckpointError, match="not a count"):
        _read([_share(rank, 2, [0], linked_bytes=(1 << 63) - 1) for rank in range(2)])


def test_whatever_shares_there_are_what_they_make_is_read_or_refused() -> None:
    chance, read = random.Random(7), 0
    for _ in range(400):
        num_ranks, num_names = chance.randint(2, 4), chance.randint(1, 5)
        shares = []
        for rank in range(num_ranks):
            drawn = [chance.choice([0, 0, *range(num_names), None]) for _ in range(num_names)]
            numbers = {item: number for number, item in enumerate(dict.fromkeys(i for i in drawn if i is not None))}
            shares.append(_share(rank, num_ranks, [None if item is None else numbers[item] for item in drawn]))
        try:
            merge(shares, "partial")
        except StagerError:
            continue
        _read(shares)
        read += 1
    assert read > 20
