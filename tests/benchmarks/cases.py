"""The states that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A state by name; ``make(scale)`` builds it, ``scale`` 1.0 being the published size."""

    name: str
    what: str
    make: Callable[[float], State]


def _big(scale: float) -> State:
    length = max(1, int((1536 << 20) * scale) // 72 // 4)
    return {f"layers.{i}.weight": torch.randn(length) for i in range(72)}


def _small(scale: float) -> State:
    return {f"layers.{i}.weight": torch.randn(256) for i in range(max(1, int(20_000 * scale)))}


CASES = {
    case.name: case
    for case in (
        Case("big", "1.5 GiB in 72 tensors", _big),
        Case("small", "20,000 tensors of 1 KiB", _small),
    )
}
