"""What the ranks of a job tell each other before they load."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def num_ranks() -> int:
    """Return how many ranks the job has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if num_ranks() > 1 else 0


def of_rank_0(value: T) -> T:
    """Return rank 0's value on every rank. Every rank calls it."""
    if num_ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all_ranks(value: T) -> list[T]:
    """Return every rank's value, in their order. Every rank calls it."""
    if num_ranks() == 1:
        return [value]
    values: list[T] = [value] * num_ranks()
    dist.all_gather_object(values, value)
    return values
