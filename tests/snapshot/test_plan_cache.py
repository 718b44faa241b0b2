"""A plan is used again when nothing changed, and never when anything did."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.snapshot.staged import Bench, tensors_are_staged
from tests.states import DTYPES, random_tensor


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_same_sources_use_the_same_plan_though_every_tensor_object_is_new(bench: Bench) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    plans = [bench.begin({"model": model, "n": n}).plan for n in range(3)]  # state_dict() detaches: new objects
    assert plans[0] is plans[1] is plans[2]


def _swap(state: dict[str, Any]) -> None:
    state["a"], state["b"] = state["b"], state["a"]


def _retie(state: dict[str, Any]) -> None:
    state["a"] = state["b"]


def _untie(state: dict[str, Any]) -> None:
    state["tied"] = state["c"].clone()


def _resize(state: dict[str, Any]) -> None:
    state["a"].resize_(100, 7)
    state["a"].fill_(3)


def _shrink_in_place(state: dict[str, Any]) -> None:
    state["a"].resize_(3)  # the address stays


def _set_data(state: dict[str, Any]) -> None:
    state["a"].data = torch.randn(4, 6)


def _transpose(state: dict[str, Any]) -> None:
    state["b"].t_()  # same address, same number of bytes


def _transpose_square(state: dict[str, Any]) -> None:
    state["square"].t_()  # the shape stays, too


def _stride_that_steps_over_nothing(state: dict[str, Any]) -> None:
    state["row"] = state["row"].as_strided((1, 4), (9, 1))  # it is contiguous with either


def _reinterpret(state: dict[str, Any]) -> None:
    state["b"] = state["b"].view(torch.int32)


def _conjugate(state: dict[str, Any]) -> None:
    state["z"] = state["z"].conj()


def _negate(state: dict[str, Any]) -> None:
    state["i"] = state["z"].conj().imag


def _rename(state: dict[str, Any]) -> None:
    state["d"] = state.pop("a")


def _reorder(state: dict[str, Any]) -> None:
    state["a"] = state.pop("a")


def _key_of_another_type(state: dict[str, Any]) -> None:
    state["nested"] = {True: state["nested"][1]}


def _value_in_place_of_tensor(state: dict[str, Any]) -> None:
    state["a"] = 5


def _sparse_in_place_of_dense(state: dict[str, Any]) -> None:
    state["a"] = state["a"].to_sparse()


def _ordered(state: dict[str, Any]) -> None:
    state["nested"] = OrderedDict(state["nested"])


def _into_a_list(state: dict[str, Any]) -> None:
    state["nested"] = [state["nested"][1]]


CHANGES = [
    _swap,
    _retie,
    _untie,
    _resize,
    _shrink_in_place,
    _set_data,
    _transpose,
    _transpose_square,
    _stride_that_steps_over_nothing,
    _reinterpret,
    _conjugate,
    _negate,
    _rename,
    _reorder,
    _key_of_another_type,
    _value_in_place_of_tensor,
    _sparse_in_place_of_dense,
    _ordered,
    _into_a_list,
    lambda state: state.update(new=torch.randn(3)),
    lambda state: state.pop("b"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_between_two_snapshots_is_found(bench: Bench, change: Callable[[dict[str, Any]], object]) -> None:
    c = torch.randn(5)
    state = {
        "a": torch.randn(4, 6),
        "b": torch.randn(6, 4),
        "c": c,
        "tied": c,
        "z": torch.randn(3, dtype=torch.complex64),
        "nested": {1: torch.randn(2)},
        "square": torch.randn(5, 5),
    }
    if change is _stride_that_steps_over_nothing:  # beside others, strides are read anyway
        state = {"row": torch.randn(1, 4)}
    before = bench.begin(state).plan
    change(state)
    slab, snapshot = bench.stage(state)
    assert snapshot.plan is not before
    assert tensors_are_staged(state, slab, snapshot.plan)
    assert (
        snapshot.plan.layout.structure != before.layout.structure
        or snapshot.plan.plan_id != before.plan_id
        or (
            change in (_swap, _set_data, _conjugate)  # other sources for the same places
        )
    )


_STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 1 << 30)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(steps=_STEPS)
def test_any_sequence_of_changes_is_staged_exactly(steps: list[tuple[int, int, int]]) -> None:
    bench, state = Bench(), {}
    try:
        for what, which, seed in steps:
            generator = torch.Generator().manual_seed(seed)
            name = f"t{which}"
            shape = tuple(int(n) for n in torch.randint(0, 9, (seed % 3,), generator=generator))
            tensor = random_tensor(DTYPES[seed % len(DTYPES)], shape, generator)
            if what == 0 or name not in state:
                state[name] = tensor
            elif what == 1:
                state[f"t{(which + 1) % 8}"] = state[name]
            elif what == 2:
                state[name] = state[name].reshape(-1)[::2]
            elif what == 3 and state[name].dim() == 2:
                state[name] = state[name].t()
            elif what == 4:
                del state[name]
            else:
                state[name] = state[name].expand(2, *state[name].shape)
            slab, snapshot = bench.stage(state)
            assert tensors_are_staged(state, slab, snapshot.plan)
    finally:
        bench.close()
