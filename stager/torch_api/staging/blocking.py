"""``BlockingAsyncStager``: copies in the calling thread."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any

import torch

from stager.torch_api.staging.contracts import AsyncStager, StateDict
from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.device import accelerator

_CHECKED_ATOMS = (int, float, str, bytes, io.BytesIO, type(None), torch.Tensor)


class BlockingAsyncStager(AsyncStager, AbstractContextManager["BlockingAsyncStager"]):
    """Copies to the CPU; the copy is complete when ``stage()`` returns.

    Args:
        cache_staged_state_dict: use the same buffers for every ``stage()`` (pinned if there is an accelerator). That saves
            allocations, and overwrites the result of the previous call. Shapes and keys may change between calls.
        type_check: raise ValueError for a value that is neither a tensor, number, string, bytes, None nor a container.
    """

    _synchronize_after_execute: bool = False

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        self.cache_staged_state_dict = cache_staged_state_dict
        self.type_check = type_check
        self.state_dict_cache: StateDict | None = None
        # Leased buffers, all released before each pass, are found again by their size. A cache by source tensor would miss
        # whenever state_dict() makes new tensors.
        self._stager = StateDictStager(pin_memory=accelerator.current() is not None, lease=True)

    def stage(self, state_dict: StateDict) -> StateDict:
        """Return a copy of ``state_dict`` on the CPU.

        Raises:
            UnstageableError: a value cannot be copied; names its key path.
            ValueError: ``type_check`` is set, and a value has another type.
        """
        if self.type_check:
            _check_types(state_dict)
        if not self.cache_staged_state_dict:
            staged: StateDict = StateDictStager().stage(state_dict)
        else:
            self._stager.release(self.state_dict_cache)
            self.state_dict_cache = staged = self._stager.stage(state_dict)
        return staged

    def synchronize_staging(self) -> None:
        """Return at once: ``stage()`` has copied everything."""

    def close(self) -> None:
        """Drop the buffers. The stager can be used again."""
        self.state_dict_cache = None
        self._stager.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _check_types(value: Any) -> None:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_types(item)
    elif not isinstance(value, _CHECKED_ATOMS):
        raise ValueError(
            f"the state dict has a {type(value).__name__}, which type_check=True refuses; type_check=False copies it"
        )
