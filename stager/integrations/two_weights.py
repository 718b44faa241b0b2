"""Optimizers with two sets of weights, which they swap outside of ``step()``.

Schedule-free optimizers have ``train()`` and ``eval()``: one turns the parameters into those that are trained, the other
into their averages. Programs call them between steps, also right after a save. What is guarded must not be written to then.
"""

from __future__ import annotations

from typing import Any


def has_two_weights(optimizer: Any) -> bool:
    """Tell whether an optimizer writes to its parameters in ``train()`` and ``eval()``.

    Args:
        optimizer: torch's or like it, not Accelerate's wrapper, which always has the two methods.
    """
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
