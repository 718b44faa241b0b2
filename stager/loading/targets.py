"""The tensors of the target that get the values of items."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from stager.workers.checkpoint.layout.structure import Path


@dataclass(slots=True)
class Targets:
    """Tensors that get the values of items, in columns, in the order of the walk. Where they share memory, it matters.

    Attributes:
        indices: of the items.
        tensors: of the target.
        paths: of each tensor.
        is_direct: the tensor certainly takes the item's bytes as they are (``direct_targets.py``).
    """

    indices: list[int] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    is_direct: list[bool] = field(default_factory=list)

    def add(self, index: int, tensor: torch.Tensor, path: Path) -> None:
        """Add a tensor that has the shape and dtype of the item."""
        self.add_all([index], [tensor], [path], is_direct=False)

    def add_all(
        self, indices: Sequence[int], tensors: Sequence[torch.Tensor], paths: Sequence[Path], *, is_direct: bool
    ) -> None:
        """Add tensors."""
        self.indices += indices
        self.tensors += tensors
        self.paths += paths
        self.is_direct += [is_direct] * len(indices)

    def first_of_each(self, without: Collection[int] = ()) -> dict[int, torch.Tensor]:
        """Return for each item its first tensor, ``without`` some items."""
        first = dict(zip(reversed(self.indices), reversed(self.tensors), strict=True))
        return {index: tensor for index, tensor in first.items() if index not in without} if without else first

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Iterate over (item, tensor)."""
        return zip(self.indices, self.tensors, strict=True)

    def __len__(self) -> int:
        return len(self.indices)
