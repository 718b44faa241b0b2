"""The state that an optimizer will have. It makes its state in its first step; before that, only its class tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from stager.state.shards import is_sharded, memory_of


def state_after_first_step(optimizer: Optimizer) -> dict[str, Any] | None:
    """Return the state dict that an optimizer will have after its first step; None if its class is not known."""
    if not isinstance(optimizer, (SGD, Adam)):  # AdamW is an Adam from torch 2.7 on
        if not isinstance(optimizer, AdamW):
            return None
    state: dict[int, dict[str, torch.Tensor]] = {}
    number = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and (entries := _entries(optimizer, group, parameter)):
                state[number] = entries
            number += 1
    return {**optimizer.state_dict(), "state": state}


def _entries(optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    like_it = {name: _like(parameter) for name in _names(optimizer, group)}
    return like_it if isinstance(optimizer, SGD) else {"step": torch.zeros((), dtype=torch.float32), **like_it}


def _names(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str]:
    """Return the entries of the state that are as large as their parameter."""
    if isinstance(optimizer, SGD):
        return ["momentum_buffer"] if group.get("momentum") else []
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]


def _like(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(parameter, device="meta")


def expected_nbytes(optimizers: Iterable[Optimizer], num_ranks: int) -> int | None:
    """Guess how many bytes this rank will save of the parameters and states of optimizers.

    Args:
        num_ranks: ranks that save together. Each writes a part of what all of them hold alike.

    Returns:
        The number of bytes; None if an optimizer of an unknown class has no state yet, or a parameter has no values yet.
    """
    total = 0
    for optimizer in optimizers:
        is_known = isinstance(optimizer, (SGD, Adam, AdamW))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found: Any = optimizer.state.get(parameter)
                state = list(found.values()) if isinstance(found, Mapping) else []
                if torch.nn.parameter.is_lazy(parameter) or not (state or is_known):
                    return None
                nbytes = _nbytes(parameter)
                if state:
                    nbytes += sum(_nbytes(value) for value in state if isinstance(value, torch.Tensor))
                elif parameter.requires_grad:
                    nbytes += nbytes * len(_names(optimizer, group))
                total += nbytes if is_sharded(parameter) else nbytes // num_ranks
    return total


def _nbytes(tensor: torch.Tensor) -> int:
    """Count this rank's bytes of a tensor; those of a sparse or nested one are pickled, and not counted."""
    parts = memory_of(tensor) if is_sharded(tensor) else [tensor]
    return sum(part.nbytes for part in parts if part.layout is torch.strided and not part.is_nested)
