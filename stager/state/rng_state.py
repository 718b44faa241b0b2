"""``RngState``: the random generators of this process, as one object that can be saved and restored."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from stager.workers.device import accelerator

logger = logging.getLogger("stager")


class RngState:
    """The random generators of this process: those of Python's ``random``, of numpy, of torch, and of each device.

    Put it into a state, so that a resumed run draws the numbers that the interrupted one would have drawn::

        state = {"model": model, "optimizer": optimizer, "rng": RngState()}

    On several ranks each rank has its own: ``PerRank(RngState())``.

    It keeps nothing: ``state_dict()`` reads the generators, and ``load_state_dict()`` sets them. What it returns is tensors,
    numbers and texts, so it is loaded without a permission. Meant are the generators that functions use to which none is
    given: ``random.random()``, ``numpy.random.rand()``, ``torch.rand()``, dropout. A generator of your own
    (``torch.Generator()``, ``numpy.random.default_rng()``) is a value of its own in your state.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator, now. Devices are among them once this process uses them."""
        version, words, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "devices": [torch.get_device_module().get_rng_state(device) for device in _devices_in_use()],
            "numpy": _converted(np.random.get_state(legacy=False), np.ndarray, _as_tensor),
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every generator to the state that ``state_dict()`` returned.

        If the state has another number of devices than this process, as many are set as both have, and a warning is logged;
        none if it has no device: the process that saved it used no accelerator.
        """
        torch.set_rng_state(state["torch"])
        _set_devices(state["devices"])
        np.random.set_state(_converted(state["numpy"], torch.Tensor, _as_array))
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))


def _devices_in_use() -> range:
    """The numbers of the accelerator's devices, if this process uses it. To read them must not begin to."""
    return range(torch.accelerator.device_count() if accelerator.is_in_use() else 0)


def _set_devices(states: list[torch.Tensor]) -> None:
    if not states:
        return
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    for device in range(min(count, len(states))):
        torch.get_device_module().set_rng_state(states[device], device)
    if count != len(states):
        logger.warning(
            "the saved RngState has the generators of %d devices, and this process has %d devices; random numbers on "
            "devices do not continue as they would have",
            len(states),
            count,
        )


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Convert what is of a class in nested dicts: numpy's arrays to tensors, and back."""
    if isinstance(value, Mapping):
        return {key: _converted(one, kind, convert) for key, one in value.items()}
    return convert(value) if isinstance(value, kind) else value


# Words are kept in signed integers of their width: pickle.loads() fails on a pickled torch.uint32 (torch 2.13), so that
# dist.all_gather_object() would, too.
_SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}
_UNSIGNED = {np.dtype(signed): unsigned for unsigned, signed in _SIGNED.items()}


def _as_tensor(words: Any) -> torch.Tensor:
    return torch.from_numpy(words.view(_SIGNED.get(words.dtype, words.dtype)))


def _as_array(words: torch.Tensor) -> Any:
    array = words.numpy()
    return array.view(_UNSIGNED.get(array.dtype, array.dtype))
