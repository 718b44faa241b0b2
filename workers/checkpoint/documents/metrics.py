"""The metrics of a checkpoint, which the user gave to ``save()``, in save records and manifests.

JSON has no NaN and no infinity, so these are written as text: ``{"loss": 0.25, "grad_norm": "nan"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, float]


def encode(metrics: Metrics) -> dict[str, float | str]:
    """Return the metrics as JSON can have them."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def decode(value: Any) -> dict[str, float]:
    """Return what :func:`encode` was given.

    Raises:
        TypeError, ValueError: these are no metrics.
    """
    if not isinstance(value, dict):
        raise TypeError(f"metrics are {type(value).__name__}")
    return {name: _number(one) for name, one in value.items()}


def _number(value: Any) -> float:
    if isinstance(value, str):
        if value not in ("nan", "inf", "-inf"):
            raise ValueError(f"{value!r} is no metric")
    elif type(value) not in (int, float):
        raise TypeError(f"{value!r} is no metric")
    return float(value)
