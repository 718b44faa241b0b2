"""What the ranks of a training agree on: what rank 0 sees, and whether what one of them loads is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

import torch.distributed as dist

from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, RankFailedError

T = TypeVar("T")


def num_ranks() -> int:
    """Return how many ranks train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Return the number of this rank."""
    return dist.get_rank() if num_ranks() > 1 else 0


def of_rank_0(look: Callable[[], T]) -> T:
    """Return what rank 0 sees, or raise its error, on every rank: of a shared file system, each may see something else."""
    if num_ranks() == 1:
        return look()
    found: list[Any] = [None, None]
    if own_rank() == 0:
        try:
            found[0] = look()
        except Exception as error:  # noqa: BLE001  # raised below, on every rank
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    seen: T = found[0]
    return seen


class _End(Enum):
    """How a load ended on one rank. STOPPED: another rank kept it from going on."""

    LOADED = auto()
    DAMAGED = auto()
    FAILED = auto()
    STOPPED = auto()


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank tells the others of its load."""

    end: _End
    problem: str


def damage_on_any_rank(load: Callable[[], object]) -> str | None:
    """Load on every rank, and return what is damaged, or gone, on the first rank that found that; None: all have loaded.

    Raises:
        RankFailedError: the load failed on another rank, for another reason.
        Exception: it failed here, for another reason.
    """
    error: Exception | None = None
    try:
        load()
    except Exception as raised:  # noqa: BLE001  # raised below, when the other ranks know
        error = raised
    told = _of_all(_told(error))
    for end in (_End.FAILED, _End.DAMAGED, _End.STOPPED):
        rank = next((number for number, one in enumerate(told) if one.end is end), None)
        if rank is None:
            continue
        if end is _End.DAMAGED:
            return told[rank].problem
        raise error or RankFailedError(f"the checkpoint was not loaded on rank {rank}: {told[rank].problem}", (rank,))
    return None


def _told(error: Exception | None) -> _Told:
    if error is None:
        return _Told(_End.LOADED, "")
    if isinstance(error, CorruptCheckpointError):
        return _Told(_End.DAMAGED, str(without_advice(error)))
    if isinstance(error, CheckpointNotFoundError):  # it was removed meanwhile
        return _Told(_End.DAMAGED, str(error))
    end = _End.STOPPED if isinstance(error, RankFailedError) else _End.FAILED
    return _Told(end, f"{type(error).__name__}: {error}")


def without_advice(error: CorruptCheckpointError) -> CorruptCheckpointError:
    """Return the error as it was raised, before the Checkpointer named the checkpoints of its own run instead."""
    return error.__cause__ if isinstance(error.__cause__, CorruptCheckpointError) else error


def _of_all(own: _Told) -> list[_Told]:
    if num_ranks() == 1:
        return [own]
    told: list[Any] = [None] * num_ranks()
    dist.all_gather_object(told, own)
    return told
