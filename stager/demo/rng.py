"""The random number generators a training run draws from, as one object that can be saved and restored."""

from __future__ import annotations

import random
from typing import Any

import torch

from stager.workers.device import accelerator


class RngState:
    """The state of torch's CPU generator, of Python's ``random``, and of each device once the accelerator is in use.

    Nothing is kept here: ``state_dict()`` reads the generators and ``load_state_dict()`` sets them.  The state is
    tensors and plain numbers only, so that a checkpoint of it can be loaded without unpickling code.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state of every generator, now."""
        version, words, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "devices": [torch.get_device_module().get_rng_state(device) for device in _devices()],
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set every generator to the state that ``state_dict()`` returned."""
        torch.set_rng_state(state["torch"])
        for device, generator in zip(_devices(), state["devices"], strict=False):
            torch.get_device_module().set_rng_state(generator, device)
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))


def _devices() -> range:
    """The numbers of the accelerator's devices, if this process uses it."""
    return range(torch.accelerator.device_count() if accelerator.is_in_use() else 0)
