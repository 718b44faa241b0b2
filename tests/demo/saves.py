"""Events of a save, as a trainer tells them."""

from __future__ import annotations

from stager.demo.events import SaveBegun, SaveCommitted, SaveStaged


def begun(step: int) -> SaveBegun:
    return SaveBegun(step, float(step))


def staged(step: int) -> SaveStaged:
    return SaveStaged(step, float(step))


def committed(step: int) -> SaveCommitted:
    return SaveCommitted(step, 1, 0.1, 0.2, 0.3, 0.4, 0.5)
