"""How large a checkpoint of many ranks is, in what the cost of a commit depends on."""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.scale.parameters import Parameters


@dataclass(frozen=True, slots=True)
class Size:
    """Attributes:
    ranks: that save together.
    tensors: of the state, each sharded over ``shards`` ranks.
    objects: that each rank has for itself.
    """

    ranks: int
    tensors: int
    shards: int
    objects: int

    @staticmethod
    def of(parameters: Parameters, num_ranks: int) -> Size:
        return Size(num_ranks, parameters.tensors, parameters.num_shards(num_ranks), parameters.objects)

    @property
    def names(self) -> int:
        """Tensors, or shards of them, that the ranks hold, all together: so many has stock DCP to plan. In the records
        are those that their ranks write, and all of rank 0's."""
        return self.ranks * self.tensors

    @property
    def rows(self) -> int:
        """Items of the checkpoint. Where ranks share a shard, they divide it between tensors here."""
        return self.shards * self.tensors + self.ranks * self.objects
