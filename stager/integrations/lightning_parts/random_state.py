"""The callback that saves the random generators, which Lightning does not."""

from __future__ import annotations

import logging
from typing import Any

from stager import RngState
from stager.integrations.lightning_parts.ranks import of_all_ranks

logger = logging.getLogger("stager")

_KEY = "stager_random_state"


class RandomStateMixin:
    """Saves the random generators of every rank: Python's, numpy's, torch's and those of its devices.

    They are restored when the first batch after a resume starts: the sanity check and the data loaders, which begin anew,
    have drawn numbers before.
    """

    _restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the generators' states to a checkpoint: a list with that of each rank."""
        checkpoint[_KEY] = of_all_ranks(RngState().state_dict())

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's state, until training begins."""
        states, rank = checkpoint.get(_KEY), trainer.global_rank
        if states is None:
            logger.warning("the checkpoint has no random states: StagerRandomState was not used when it was saved")
        elif rank >= len(states):
            logger.warning(
                "the checkpoint has the random states of %d ranks, and this is rank %d: it goes on with its own",
                len(states),
                rank,
            )
        else:
            self._restored = states[rank]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the generators, before the first batch after a resume."""
        if self._restored is not None:
            RngState().load_state_dict(self._restored)
            self._restored = None
