"""The kinds of optimizers whose state ``stager plan`` can tell before there is one."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from stager.state.optimizer_states import state_after_first_step


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
