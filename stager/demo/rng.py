"""The random number generators a training run draws from, as one object that can be saved and restored."""

from __future__ import annotations

import random
from typing import Any

import torch


class RngState:
    """The state of torch's CPU generator, of Python's ``random``, and of each CUDA device once CUDA is in use.

    Nothing is kept here: ``state_dict()`` reads the generators and ``load_state_dict()`` sets them.  The state is
    tensors and plain numbers only, so that a checkpoint of it can be loaded without unpickling code.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state of every generator, now."""
        version, words, gauss = random.getstate()
        cuda_in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch gives it no types
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if cuda_in_use else [],
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set every generator to the state that ``state_dict()`` returned."""
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
