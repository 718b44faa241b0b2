"""``PerRank``: marks a value of which each rank has its own."""

from __future__ import annotations

from typing import Any


class PerRank:
    """In a state given to ``save()`` or ``load(into=)``: each rank stores, and gets back, its own ``value``.

    Without it, a value that is no DTensor is taken to be the same on all ranks, and is stored once. Random states, data
    loaders and the like are not the same::

        ckpt.save(step, {"model": model, "optimizer": opt, "loader": PerRank(loader)})

    In the checkpoint the value stands under one more key, ``rank-0``, ``rank-1``, ... A rank that has none there (the job
    has more ranks now) keeps what it has, with a warning.

    Args:
        value: anything that may be in a state. To be restored by ``load(into=)``, a mapping, a list, a tensor or an object
            with ``load_state_dict()``.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def rank_key(rank: int) -> str:
    """The key of a rank's own value."""
    return f"rank-{rank}"
