"""Whether one object graph is an exact, private copy of another: structure, types, identity, values, strides, aliasing."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any

import torch

from stager.workers.offload.hook_memo import reachable_leaves

ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    torch.dtype,
    torch.Size,
    types.FunctionType,
    range,
    types.EllipsisType,
    torch.device,
    torch.layout,
)


class Comparison:
    """``expected`` and ``got`` must be isomorphic: equal parts, and shared exactly where the other one shares."""

    def __init__(self) -> None:
        self._twins: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._alive: list[Any] = []

    def same(self, expected: Any, got: Any, path: str = "state") -> None:
        assert type(got) is type(expected), f"{path}: {type(got)} for {type(expected)}"
        if isinstance(expected, ATOMS):
            equal = got == expected or (got != got and expected != expected)  # noqa: PLR0124  (nan is not equal to itself)
            assert got is expected or equal, f"{path}: {got!r} for {expected!r}"
            return
        if id(expected) in self._twins:
            assert self._twins[id(expected)] == id(got), f"{path}: shared in one and not in the other"
            return
        self._twins[id(expected)] = id(got)
        self._alive += [expected, got]
        if isinstance(expected, torch.Tensor):
            self.same_tensor(expected, got, path)
        else:
            self.same_parts(expected, got, path)

    def same_tensor(self, expected: torch.Tensor, got: torch.Tensor, path: str) -> None:
        for name in ("dtype", "shape", "layout", "requires_grad"):
            assert getattr(got, name) == getattr(expected, name), f"{path}.{name}"
        assert got.stride() == expected.stride(), f"{path}: strides"
        assert got.storage_offset() == expected.storage_offset(), f"{path}: storage offset"
        assert (got.is_conj(), got.is_neg()) == (expected.is_conj(), expected.is_neg()), f"{path}: conj, neg"
        mine, theirs = expected.untyped_storage(), got.untyped_storage()
        self._alive += [mine, theirs]
        assert self._storages.setdefault(id(mine), id(theirs)) == id(theirs), f"{path}: aliasing"
        assert self._storages.setdefault(-id(theirs), -id(mine)) == -id(mine), f"{path}: aliasing"
        assert raw(mine) == raw(theirs), f"{path}: bytes"
        assert vars(expected).keys() == vars(got).keys(), f"{path}: attributes"
        for name, value in vars(expected).items():
            self.same(value, getattr(got, name), f"{path}.{name}")

    def same_parts(self, expected: Any, got: Any, path: str) -> None:
        if isinstance(expected, (list, tuple, collections.deque)):
            assert len(got) == len(expected), f"{path}: length"
            for index, (one, other) in enumerate(zip(expected, got, strict=True)):
                self.same(one, other, f"{path}[{index}]")
        elif isinstance(expected, (set, frozenset)):
            assert got == expected, path
        elif isinstance(expected, dict):
            assert list(got) == list(expected), f"{path}: keys"
            for key, value in expected.items():
                self.same(value, got[key], f"{path}[{key!r}]")
        elif dataclasses.is_dataclass(expected):
            for field in dataclasses.fields(expected):
                self.same(getattr(expected, field.name), getattr(got, field.name), f"{path}.{field.name}")
        else:
            self.same(vars(expected), vars(got), f"{path}.__dict__")


def assert_no_shared_memory(source: Any, staged: Any) -> None:
    """No byte of a storage behind one lies in a storage behind the other."""
    edges = [(start, nbytes, "source") for start, nbytes in _ranges(source)]
    edges += [(start, nbytes, "copy") for start, nbytes in _ranges(staged)]
    end = {"source": 0, "copy": 0}  # of the ranges that began before
    for start, nbytes, side in sorted(edges):
        assert start >= end["copy" if side == "source" else "source"], "the copy shares memory with the source"
        end[side] = max(end[side], start + nbytes)


def _ranges(value: Any) -> list[tuple[int, int]]:
    storages = [
        leaf if isinstance(leaf, torch.UntypedStorage) else leaf.untyped_storage()
        for leaf in reachable_leaves(value, {})
    ]
    return [(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()]


def raw(storage: torch.UntypedStorage) -> bytes:
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy())


def assert_same(expected: Any, got: Any) -> None:
    Comparison().same(expected, got)


def assert_private_copy(source: Any, staged: Any) -> None:
    assert_same(source, staged)
    assert_no_shared_memory(source, staged)
