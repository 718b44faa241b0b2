"""``BlockingAsyncStager``: stages in the calling thread and returns when all is copied."""

from __future__ import annotations

import io
from typing import Any

import torch

from stager.torch_api.staging.contracts import AsyncStager, StateDict
from stager.torch_api.staging.state_dict_stager import StateDictStager

_CHECKED_ATOMS = (int, float, str, bytes, io.BytesIO, type(None), torch.Tensor)


class BlockingAsyncStager(AsyncStager):
    """A copy on the CPU, whole when ``stage()`` returns.

    Args:
        cache_staged_state_dict: use the same buffers for every ``stage()`` (pinned where CUDA is available), which
            saves allocating them and overwrites the result before. Shapes and keys may change between calls.
        type_check: raise ValueError for values that are not a tensor, number, string, bytes, None or a container of those.
    """

    _synchronize_after_execute: bool = False

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        self.cache_staged_state_dict = cache_staged_state_dict
        self.type_check = type_check
        self.state_dict_cache: StateDict | None = None
        self._stager: StateDictStager | None = None

    def stage(self, state_dict: StateDict) -> StateDict:
        """A copy of ``state_dict`` on the CPU. Raises UnstageableError, or ValueError with ``type_check``."""
        if self.type_check:
            _check_types(state_dict)
        if not self.cache_staged_state_dict:
            staged: StateDict = StateDictStager().stage(state_dict)
            return staged
        if self._stager is None:
            # Leased buffers, all released before each pass: found again by size, whatever tensors the state holds
            # now. A cache by source would miss whenever state_dict() makes new tensors.
            self._stager = StateDictStager(pin_memory=torch.cuda.is_available(), lease=True)
        self._stager.release(self.state_dict_cache)
        self.state_dict_cache = self._stager.stage(state_dict)
        return self.state_dict_cache

    def synchronize_staging(self) -> None:
        """Nothing to wait for: ``stage()`` has copied everything."""

    def close(self) -> None:
        """Forget the buffers. The stager can be used again."""
        self.state_dict_cache = None
        if self._stager is not None:
            self._stager.close()

    def __enter__(self) -> BlockingAsyncStager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _check_types(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _check_types(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_types(item)
    elif not isinstance(value, _CHECKED_ATOMS):
        raise ValueError(f"unexpected type {type(value).__name__} in the state dict; type_check=False would copy it")
