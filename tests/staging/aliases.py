"""A state whose tensors share memory in every way."""

from __future__ import annotations

from typing import Any

import torch


def views() -> dict[str, Any]:
    base = torch.randn(10, 10)
    return {
        "base": base,
        "flat": base.view(100),
        "slice": base[2:8, 2:8],
        "transposed": base.t(),
        "nested": {"column": base[:, 3], "tail": base.view(100)[10:60]},
        "expanded": torch.randn(1, 4).expand(3, 4),
        "other": [torch.arange(6), (torch.zeros(0, 3), torch.tensor(2.5))],
    }
