"""Large numpy arrays: their bytes are those of a tensor in the object's archive, and they are arrays again when loaded."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stager import Checkpointer
from stager.loading.pickles.pickle_check import check_pickle
from stager.workers.checkpoint.formats.object_pickle import pickle_object

LARGE = np.arange(1 << 19, dtype=np.float32).reshape(512, 1024)


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_large_arrays_come_back_as_they_were(run_dir: Path, kind: str) -> None:
    many: list[Any] = [{"i": i} for i in range(100)]
    state = {"c": LARGE, "f": np.asfortranarray(LARGE), "twice": (LARGE, LARGE, LARGE[::2]), "many": [*many, LARGE]}
    with Checkpointer(run_dir, {"persistence": {"format": kind}}) as ckpt:
        info = ckpt.save(1, state).upload_completion.result()
        loaded = ckpt.load()
    assert loaded is not None
    got = loaded.state
    for name in ("c", "f"):
        assert type(got[name]) is np.ndarray
        assert (got[name].dtype, got[name].strides) == (LARGE.dtype, np.asarray(state[name]).strides)
        assert np.array_equal(got[name], LARGE)
        got[name][0] = 1  # it is its own, and may be written
    assert got["twice"][0] is got["twice"][1]
    assert np.array_equal(got["twice"][0], LARGE)
    assert np.array_equal(got["twice"][2], LARGE[::2])
    assert np.array_equal(got["many"][-1], LARGE)
    assert info.nbytes < 7.5 * LARGE.nbytes  # pickle would make half as much again of it


@pytest.mark.parametrize(
    "array",
    [
        *(LARGE[:, ::2], LARGE.astype(np.longdouble), LARGE.astype(">f4"), LARGE.astype("M8[s]")),
        *(LARGE.view(np.matrix), np.frombuffer(LARGE.tobytes(), np.float32), LARGE.view([("a", "f4"), ("b", "f4")])),
    ],
    ids=["gaps", "longdouble", "big-endian", "dates", "subclass", "read-only", "fields"],
)
def test_arrays_that_no_tensor_can_stand_for_are_pickled_as_ever(array: np.ndarray[Any, Any]) -> None:
    oracle = io.BytesIO()
    torch.save(array, oracle)
    want = torch.load(io.BytesIO(oracle.getvalue()), weights_only=False)
    got = torch.load(io.BytesIO(pickle_object(array, 0).blob), weights_only=False)
    assert (type(got), got.dtype) == (type(want), want.dtype)
    assert np.array_equal(got, array)


class _Call:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return np.asarray, self.arguments


@pytest.mark.parametrize("arguments", [([1, 2],), (1, "V1000000000000"), ("x",), (torch.Size([1]),), ()])
def test_no_checkpoint_calls_asarray_with_anything_else(arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"numpy\.asarray"):
        check_pickle(pickle.dumps(_Call(*arguments), 2))
