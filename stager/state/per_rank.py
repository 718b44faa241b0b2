"""``PerRank``: marks a value of which each rank has its own."""

from __future__ import annotations

from typing import Any


class PerRank:
    """Marks a value of a state, in ``save()`` or ``load(into=)``, of which each rank stores and gets back its own.

    Without it, a value that is no DTensor is assumed to be the same on all ranks, and is stored once. Random states and data
    loaders, for example, differ between ranks::

        ckpt.save(step, {"model": model, "optimizer": opt, "loader": PerRank(loader)})

    In the checkpoint, the value has one more key: ``rank-0``, ``rank-1``, ... If the job has more ranks now, a rank without
    a stored value keeps its own, and logs a warning. If it has fewer, ``Loaded.per_rank`` offers the values of the others.

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
    """Return the key of a rank's own value in the checkpoint."""
    return f"rank-{rank}"
