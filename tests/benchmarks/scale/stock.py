"""The messages of one save of stock ``dcp.async_save``, which does all of this for each save (torch 2.13; the same without
``enable_plan_caching``, its default, in 2.6).

``torch/distributed/checkpoint/state_dict_saver.py``, ``_save_state_dict``:
    reduce_scatter("plan")   gather_object of every rank's plan to rank 0; create_global_plan; scatter_object_list
    all_reduce("write")      gather_object of the write results; rank 0 writes .metadata; broadcast_object_list of all of it
``torch/distributed/distributed_c10d.py``:
    gather_object            all_gather of the lengths; gather, each as long as the longest
    scatter_object_list      broadcast of the longest length; scatter, each that long; scatter of the lengths
    broadcast_object_list    broadcast of the length; broadcast
gloo, which a process group needs for async_save:
    all_gather               a ring: each rank sends 2 (n - 1) messages, two on their way at a time
    gather, scatter          rank 0 to or from each other one
    broadcast                a binary tree: rank 0 sends log2(n) times
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.benchmarks.scale.measured import Stock
from tests.benchmarks.scale.parameters import Parameters

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Collective:
    """Attributes:
    messages, nbytes: of all ranks.
    coordinator_messages, coordinator_bytes: that rank 0 sends and receives.
    secs: when all ranks come at once.
    """

    messages: int
    nbytes: float
    coordinator_messages: int
    coordinator_bytes: float
    secs: float

    def __add__(self, other: Collective) -> Collective:
        return Collective(
            self.messages + other.messages,
            self.nbytes + other.nbytes,
            self.coordinator_messages + other.coordinator_messages,
            self.coordinator_bytes + other.coordinator_bytes,
            self.secs + other.secs,
        )


@dataclass(frozen=True, slots=True)
class StockSave:
    """Attributes:
    plan: what comes before the first byte is written, seconds without ``plan_secs``.
    end: what comes after the last.
    plan_secs: rank 0's CPU time between gather and scatter.
    end_secs: rank 0's CPU time, and then that of all others.
    metadata_bytes: that each rank receives.
    """

    plan: Collective
    end: Collective
    plan_secs: float
    end_secs: float
    metadata_bytes: float

    @property
    def both(self) -> Collective:
        return self.plan + self.end


class _Gloo:
    def __init__(self, parameters: Parameters, num_ranks: int) -> None:
        self._others = num_ranks - 1
        self._ranks = num_ranks
        self._trip_secs = parameters.network_round_trip_secs / 2
        self._link = parameters.link_bytes_per_sec

    def star(self, nbytes: float) -> Collective:
        """Gather or scatter, so many bytes for each rank."""
        total = self._others * nbytes
        return Collective(self._others, total, self._others, total, self._trip_secs + total / self._link)

    def ring(self, nbytes: float) -> Collective:
        """All-gather, so many bytes of each rank."""
        total = self._others * nbytes
        return Collective(
            messages=2 * self._ranks * self._others,
            nbytes=self._ranks * total,
            coordinator_messages=4 * self._others,
            coordinator_bytes=2 * total,
            secs=self._others * self._trip_secs + total / self._link,
        )

    def tree(self, nbytes: float) -> Collective:
        """Broadcast."""
        depth = math.ceil(math.log2(self._ranks))
        return Collective(
            messages=self._others,
            nbytes=self._others * nbytes,
            coordinator_messages=depth,
            coordinator_bytes=depth * nbytes,
            secs=depth * (self._trip_secs + nbytes / self._link),
        )

    def gather_object(self, nbytes: float) -> Collective:
        return self.ring(_LENGTH_BYTES) + self.star(nbytes)

    def scatter_object(self, nbytes: float) -> Collective:
        return self.tree(_LENGTH_BYTES) + self.star(nbytes) + self.star(_LENGTH_BYTES)

    def broadcast_object(self, nbytes: float) -> Collective:
        return self.tree(_LENGTH_BYTES) + self.tree(nbytes)


def stock_save(parameters: Parameters, num_ranks: int, costs: Stock) -> StockSave:
    gloo = _Gloo(parameters, num_ranks)
    plan_bytes, result_bytes = costs.plan_bytes / num_ranks, costs.result_bytes / num_ranks
    return StockSave(
        plan=gloo.gather_object(plan_bytes) + gloo.scatter_object(plan_bytes),
        end=gloo.gather_object(result_bytes) + gloo.broadcast_object(costs.metadata_bytes),
        plan_secs=costs.plan_secs,
        end_secs=costs.finish_secs + costs.load_secs,
        metadata_bytes=costs.metadata_bytes,
    )
