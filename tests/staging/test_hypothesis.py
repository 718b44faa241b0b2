"""Arbitrary nested state: what is staged equals ``copy.deepcopy`` in every respect and shares no memory with the source."""

from __future__ import annotations

import collections
import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stager import WorkerStager
from stager.torch_api.staging.state_dict_stager import StateDictStager
from tests.staging.compare import assert_no_shared_memory, assert_same

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32,
    torch.int64, torch.uint64, torch.bool,
]  # fmt: skip
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=4))


@dataclass
class Record:
    a: Any
    b: Any = None


@dataclass(frozen=True)
class Fixed:
    a: Any


class Row(NamedTuple):
    a: Any
    b: Any


class Thing:
    def __init__(self, a: Any) -> None:
        self.a = a


class Slotted:
    __slots__ = ("__dict__", "a")

    def __init__(self, a: Any) -> None:
        self.a = a
        self.again = [a]


@st.composite
def tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    """One storage of random bytes and some views of it, with strides, offsets, overlaps and attributes."""
    dtype = draw(st.sampled_from(DTYPES))
    count = draw(st.integers(0, 24))
    itemsize = torch.empty(0, dtype=dtype).element_size()
    data = torch.tensor(list(draw(st.binary(min_size=count * itemsize, max_size=count * itemsize))), dtype=torch.uint8)
    base = torch.empty(0, dtype=dtype).set_((data & 1 if dtype is torch.bool else data).untyped_storage(), 0, (count,))
    views = [base]
    for _ in range(draw(st.integers(0, 3))):
        size = draw(st.lists(st.integers(0, 4), max_size=3))
        stride = [draw(st.integers(0, 4)) for _ in size]
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if 0 not in size else 0
        if reach <= count:
            views.append(base.as_strided(size, stride, draw(st.integers(0, count - reach))))
    if draw(st.booleans()):
        views[-1].note = draw(ATOMS)
    if draw(st.booleans()) and dtype.is_floating_point and itemsize > 1:
        views.append(torch.nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=draw(st.booleans())))
    return views


MAKERS = [
    lambda one, other: [one, other, one],
    lambda one, other: (one, other),
    lambda one, other: {"x": one, 3: other},
    lambda one, other: collections.OrderedDict(q=one, p=other),
    lambda one, other: collections.defaultdict(list, k=one),
    lambda one, other: collections.deque([one, other], maxlen=5),
    Record,
    Row,
    lambda one, _: Fixed(one),
    lambda one, _: Thing(one),
    lambda one, _: Slotted(one),
]


@st.composite
def states(draw: st.DrawFn) -> Any:
    """A graph: each container takes parts made before it, any number of times; then some links back make cycles."""
    parts: list[Any] = [draw(ATOMS), {1, "s"}]
    for _ in range(draw(st.integers(1, 3))):
        parts += draw(tensors())
    for _ in range(draw(st.integers(1, 10))):
        maker = draw(st.sampled_from(MAKERS))
        parts.append(maker(draw(st.sampled_from(parts)), draw(st.sampled_from(parts))))
    mutable = [part for part in parts if type(part) in (list, dict)]
    for container in draw(st.lists(st.sampled_from(mutable), max_size=2)) if mutable else []:
        link = draw(st.sampled_from(parts))
        if isinstance(container, list):
            container.append(link)
        else:
            container["back"] = link
    return {"root": parts[-1], "some": draw(st.lists(st.sampled_from(parts), max_size=4))}


def check(state: Any, share_memory: bool, lease: bool) -> None:
    expected = copy.deepcopy(state)
    staged = StateDictStager(share_memory=share_memory, lease=lease).stage(state)
    assert_same(expected, staged)
    if is_same(state, expected):  # deepcopy makes two of a named tuple that contains itself
        assert_same(state, staged)
    assert_no_shared_memory(state, staged)


def check_by_workers(state: Any, stager: WorkerStager) -> None:
    staged = stager.stage(state).result()
    if not is_same(state, staged):  # a named tuple that contains itself: deepcopy makes two of it, and workers one
        assert_same(copy.deepcopy(state), staged)
    assert_no_shared_memory(state, staged)


def is_same(one: Any, other: Any) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(states(), st.booleans(), st.booleans())
def test_staged_equals_deepcopy(state: Any, share_memory: bool, lease: bool) -> None:
    check(state, share_memory, lease)


@pytest.mark.long
@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(states(), st.booleans(), st.booleans())
def test_staged_equals_deepcopy_2500_times(state: Any, share_memory: bool, lease: bool) -> None:
    check(state, share_memory, lease)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states())
def test_staged_by_workers_equals_deepcopy(worker_stager: WorkerStager, state: Any) -> None:
    check_by_workers(state, worker_stager)


@pytest.mark.long
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states())
def test_staged_by_workers_equals_deepcopy_2000_times(worker_stager: WorkerStager, state: Any) -> None:
    check_by_workers(state, worker_stager)
