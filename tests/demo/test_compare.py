"""The comparison finds one flipped bit anywhere, and says where."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from stager.demo.compare import count_tensors, loss_differences, state_differences


def make_state() -> dict[str, Any]:
    return {
        "weights": torch.tensor([[1.0, float("nan")], [0.0, -2.5]]),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "step": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "groups": [{"lr": 0.1, "params": [0, 1]}, (1, None)],
    }


def test_a_state_equals_its_copy_nan_included() -> None:
    assert list(state_differences(make_state(), copy.deepcopy(make_state()))) == []


def test_a_view_equals_the_same_values_laid_out_otherwise() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert list(state_differences(matrix.t(), matrix.t().contiguous())) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("weights",), torch.tensor([[1.0, float("nan")], [-0.0, -2.5]]), "1 of 4 elements differ, .* flat index 2"),
        (("half",), torch.tensor([1.0, 2.0]), "float32"),
        (("step",), torch.tensor([7]), r"\(1,\)"),
        (("empty",), torch.empty(0, 4), r"\(0, 4\)"),
        (("groups", 0, "lr"), math.nextafter(0.1, 1.0), "0x1"),
        (("groups", 0, "params"), [0], "1 items instead of 2"),
        (("groups", 1), [1, None], "list instead of tuple"),
        (("groups", 0, "lr"), 1, "int instead of float"),
    ],
)  # fmt: skip
def test_a_difference_is_named_by_its_place(path: tuple[Any, ...], value: Any, message: str) -> None:
    changed = make_state()
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(AssertionError, match=message):
        assert list(state_differences(make_state(), changed, "state")) == []
    (found,) = state_differences(make_state(), changed, "state")
    assert found.startswith("state" + "".join(f"[{key!r}]" for key in path))


def test_missing_and_unexpected_keys_are_both_named() -> None:
    assert sorted(state_differences({"a": 1, "b": 2}, {"b": 2, "c": 3}, "s")) == [
        "s['a']: missing",
        "s['c']: not in the other run",
    ]


def test_losses_are_compared_for_the_steps_that_were_run() -> None:
    truth = {1: "0x1p+0", 2: "0x1p+1", 3: "0x1p+2"}
    assert list(loss_differences(truth, {2: "0x1p+1"}, "resumed")) == []
    assert list(loss_differences(truth, {3: "0x1p+3", 4: "0x1p+0"}, "resumed")) == [
        "resumed: loss of step 3 is 0x1p+3 instead of 0x1p+2",
        "resumed: loss of step 4 is 0x1p+0 instead of nothing",
    ]


def test_tensors_are_counted_with_their_bytes() -> None:
    assert count_tensors(make_state()) == (4, 16 + 4 + 8)
