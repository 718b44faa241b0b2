"""Ranks that are threads of the test, over torch's in-memory store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous

T = TypeVar("T")


def on_ranks(num_ranks: int, body: Callable[[Job], T], timeout_secs: float = 20.0) -> list[T]:
    store = dist.HashStore()
    jobs = [RankGroup(rank, num_ranks, Rendezvous(store, "test", num_ranks), timeout_secs) for rank in range(num_ranks)]
    try:
        with ThreadPoolExecutor(num_ranks) as executor:
            return [future.result() for future in [executor.submit(body, group) for group in jobs]]
    finally:
        for group in jobs:
            group.close()
