"""Pickers: the same items of one sequence after another, without Python code for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

Picker = Callable[[Sequence[Any]], Sequence[Any]]


def picker(numbers: Sequence[int]) -> Picker:
    """Return a function that picks the items of these numbers."""
    if len(numbers) < 2:  # itemgetter returns no sequence then
        return lambda values: [values[number] for number in numbers]
    return itemgetter(*numbers)
