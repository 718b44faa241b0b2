"""The state that an optimizer will have. It makes the state in its first step, so there is nothing to measure before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer


class OptimizerKind(str, Enum):
    """An optimizer whose state can be told before its first step."""

    ADAMW = "adamw"
    ADAM = "adam"
    SGD = "sgd"
    NONE = "none"


_ASSUMED = {
    OptimizerKind.ADAMW: "AdamW: two tensors like each parameter that requires a gradient, and a step count",
    OptimizerKind.ADAM: "Adam: two tensors like each parameter that requires a gradient, and a step count",
    OptimizerKind.SGD: "SGD with momentum: one tensor like each parameter that requires a gradient",
}


def new_state(kind: OptimizerKind, parameters: Iterable[torch.Tensor]) -> tuple[dict[str, Any], str]:
    """Return the state dict of an optimizer after its first step, on the meta device, and what was assumed."""
    parameters = list(parameters)
    optimizer: Optimizer
    if kind is OptimizerKind.SGD:
        optimizer = SGD(parameters, lr=0.1, momentum=0.9)
    else:
        optimizer = (AdamW if kind is OptimizerKind.ADAMW else Adam)(parameters)
    state = state_after_first_step(optimizer)
    assert state is not None  # the kinds above are known
    return state, f"the optimizer is {_ASSUMED[kind]}, of the parameter's dtype"


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
    if isinstance(optimizer, SGD):
        names = ["momentum_buffer"] if group["momentum"] else []
        return {name: _like(parameter) for name in names}
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    return {"step": torch.zeros((), dtype=torch.float32), **{name: _like(parameter) for name in names}}


def _like(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(parameter, device="meta")
