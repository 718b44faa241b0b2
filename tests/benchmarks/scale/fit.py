"""From figures at some sizes to figures at any: linear in ranks, names and rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.benchmarks.scale.size import Size


@dataclass(frozen=True, slots=True)
class Linear:
    """Attributes:
    per_rank, per_name, per_row: none is negative.
    worst: the largest relative error where it was measured.
    """

    per_rank: float
    per_name: float
    per_row: float
    worst: float

    def at(self, size: Size) -> float:
        return self.per_rank * size.ranks + self.per_name * size.names + self.per_row * size.rows


def fit(sizes: Sequence[Size], values: Sequence[float]) -> Linear:
    """The least squares of the relative errors."""
    measured = np.maximum(np.array(values, dtype=float), 1e-9)
    design = np.array([[size.ranks, size.names, size.rows] for size in sizes], dtype=float) / measured[:, None]
    best, least = np.zeros(3), np.inf
    for columns in _subsets(3):
        solution = np.zeros(3)
        solution[columns] = np.linalg.lstsq(design[:, columns], np.ones(len(sizes)), rcond=None)[0]
        error = float(np.square(design @ solution - 1).sum())
        if (solution >= 0).all() and error < least * (1 - 1e-9):  # all sizes of as many tensors: names are ranks
            best, least = solution, error
    per_rank, per_name, per_row = best.tolist()
    return Linear(per_rank, per_name, per_row, float(np.abs(design @ best - 1).max()))


def _subsets(count: int) -> list[list[int]]:
    return [list(some) for number in range(1, count + 1) for some in itertools.combinations(range(count), number)]
