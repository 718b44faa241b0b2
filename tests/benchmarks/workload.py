"""The state of a case: what a user would hand to ``save()``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer


@dataclass(slots=True)
class Workload:
    """Names to modules, optimizers or dicts of tensors.

    Attributes:
        objects: what is saved.
        optimizers: those whose ``step()`` alone changes what they hold; stager's guard takes them.
        changing: the tensors that training changes.
    """

    objects: dict[str, Any]
    optimizers: list[Optimizer] = field(default_factory=list)
    changing: list[torch.Tensor] = field(default_factory=list)

    def collect(self) -> dict[str, Any]:
        """Plain nested state dicts, as the peers take them. Cheap, and part of what they are timed on."""
        return {name: value if isinstance(value, dict) else value.state_dict() for name, value in self.objects.items()}

    def tensors(self) -> list[torch.Tensor]:
        """Every storage once."""
        found: dict[int, torch.Tensor] = {}
        _walk(self.collect(), found)
        return list(found.values())

    def mutate(self) -> None:
        """As a training step would."""
        import torch

        with torch.no_grad():
            torch._foreach_add_(self.changing, 1e-3)


def _walk(value: Any, found: dict[int, torch.Tensor]) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        found.setdefault(value.untyped_storage().data_ptr(), value.detach())
    elif isinstance(value, dict):
        for child in value.values():
            _walk(child, found)
    elif isinstance(value, list | tuple):
        for child in value:
            _walk(child, found)
