"""What numpy has."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.states.corpus.registry import state, values
from tests.states.corpus.tensors import rand


def _legacy_state() -> Any:
    return np.random.RandomState(3).get_state()


values(
    "numpy",
    {
        "numpy-float64": lambda: np.float64(0.5),
        "numpy-scalars-in-list": lambda: [np.float64(0.5), np.int32(3), np.bool_(True), np.float16(1)],
        "numpy-scalar-in-tuple": lambda: (1, np.float32(0.5)),
        "numpy-complex": lambda: np.complex64(1j),
        "numpy-datetime64": lambda: np.datetime64("2026-01-02"),
        "numpy-str": lambda: np.str_("abc"),
        "numpy-array": lambda: np.arange(12.0).reshape(3, 4),
        "numpy-array-fortran": lambda: np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "numpy-array-strided": lambda: np.arange(12.0)[::2],
        "numpy-array-bool": lambda: np.array([True, False]),
        "numpy-array-big-endian": lambda: np.arange(3, dtype=">i4"),
        "numpy-array-text": lambda: np.array(["a", "bc"]),
        "numpy-array-structured": lambda: np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        "numpy-array-empty": lambda: np.empty((0, 3)),
        "numpy-array-scalar": lambda: np.array(3.0),
        "numpy-array-in-list": lambda: [rand(1), np.arange(3)],
        "numpy-array-large": lambda: np.arange(1 << 20, dtype=np.float64),
        "numpy-dtype": lambda: np.dtype("float32"),
        "numpy-legacy-random-state": _legacy_state,
        "numpy-generator-state": lambda: np.random.default_rng(3).bit_generator.state,
    },
    by_default=True,
)
values(
    "numpy",
    {
        "numpy-array-object": lambda: np.array([1, "a", None], dtype=object),
        "numpy-masked": lambda: np.ma.masked_array([1, 2, 3], mask=[0, 1, 0]),
        "numpy-generator": lambda: np.random.default_rng(3),
        "numpy-random-state": lambda: np.random.RandomState(3),
        "numpy-matrix-record": lambda: np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    },
)


@state("numpy-as-keys", "numpy")
def _keys() -> dict[str, Any]:
    return {"x": {np.int64(3): rand(1), np.str_("a"): 2}}
