"""Objects that give and take their state: modules, optimizers, schedulers, data loaders."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Stateful(Protocol):
    """An object that can give and take its state: a module, an optimizer, a scheduler, a data loader."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def is_stateful(value: object) -> bool:
    """Tell whether a value that is no tensor is Stateful. ``isinstance(value, Stateful)`` is slow.

    The methods have to be the class's: an object that answers to every name, as a mock or a proxy does, is none.
    """
    return is_stateful_class(type(value)) and not isinstance(value, (torch.Tensor, type))


def is_stateful_class(kind: type) -> bool:
    """Tell whether a class has the two methods."""
    return hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict") and callable(kind.state_dict)
