"""Which save every rank's partner has: all ranks are of one opinion, whatever pace each of them has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.replication.replicas import Replicas
from stager.replication.replicator import Replicator

_dist: Any = dist  # not all of it is annotated


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Replicator]]:
    store = _dist.HashStore()
    jobs = [RankGroup(rank, 3, Rendezvous(store, "test", 3)) for rank in range(3)]
    yield [Replicator(group, Replicas(str(tmp_path), "/run"), "old") for group in jobs]
    for group in jobs:
        group.close()


def whole(ranks: list[Replicator]) -> set[str]:
    for rank in ranks:
        rank._update_whole_id()
    return {rank._whole_id for rank in ranks}


def test_a_save_is_whole_when_the_last_partner_has_it(three: list[Replicator]) -> None:
    for save_id in ("first", "second"):
        for rank in three:
            rank._count(save_id)
        assert whole(three) == {save_id}
        assert not any(rank._give_up(save_id) for rank in three)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_who_makes_room_before_the_last_has_come_breaks_it_for_all(
    order: tuple[int, int, int], three: list[Replicator]
) -> None:
    first, second, last = (three[number] for number in order)
    first._count("save")
    second._count("save")
    assert first._give_up("save")  # about to receive the next one
    last._count("save")
    assert whole(three) == {"old"}
    for rank in three:
        rank._count("next")
    assert whole(three) == {"next"}
