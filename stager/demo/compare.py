"""Comparison bit for bit: every value that is not exactly the same is named."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from stager.state.bits import bits_of


def state_differences(expected: Any, actual: Any, path: str = "") -> Iterator[str]:
    """One line per value of two nested states that differs, in type, shape or any bit.

    Floats and tensors are compared by their bits: 0.0 and -0.0 differ, and a NaN equals the same NaN.
    """
    if type(expected) is not type(actual):
        yield f"{path}: {type(actual).__name__} instead of {type(expected).__name__}"
    elif isinstance(expected, torch.Tensor):
        yield from _tensor_differences(expected, actual, path)
    elif isinstance(expected, Mapping):
        yield from _mapping_differences(expected, actual, path)
    elif isinstance(expected, (list, tuple)):
        yield from _sequence_differences(expected, actual, path)
    elif isinstance(expected, float):
        if struct.pack("<d", expected) != struct.pack("<d", actual):
            yield f"{path}: {actual.hex()} instead of {expected.hex()}"
    elif expected != actual:
        yield f"{path}: {actual!r} instead of {expected!r}"


def loss_differences(expected: Mapping[int, str], actual: Mapping[int, str], run: str) -> Iterator[str]:
    """One line per step of ``actual`` whose loss is not, bit for bit, that of the same step of ``expected``."""
    for step, bits in actual.items():
        if expected.get(step) != bits:
            yield f"{run}: loss of step {step} is {bits} instead of {expected.get(step, 'nothing')}"


def count_tensors(state: Any) -> tuple[int, int]:
    """The number of tensors in a nested state, and their bytes; a tensor under two names counts twice."""
    if isinstance(state, torch.Tensor):
        return 1, state.nbytes
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    counts = [count_tensors(value) for value in values]
    return sum(number for number, _ in counts), sum(nbytes for _, nbytes in counts)


def _mapping_differences(expected: Mapping[Any, Any], actual: Mapping[Any, Any], path: str) -> Iterator[str]:
    for key in expected.keys() - actual.keys():
        yield f"{path}[{key!r}]: missing"
    for key in actual.keys() - expected.keys():
        yield f"{path}[{key!r}]: not in the other run"
    for key in expected.keys() & actual.keys():
        yield from state_differences(expected[key], actual[key], f"{path}[{key!r}]")


def _sequence_differences(expected: Sequence[Any], actual: Sequence[Any], path: str) -> Iterator[str]:
    if len(expected) != len(actual):
        yield f"{path}: {len(actual)} items instead of {len(expected)}"
        return
    for index, (one, other) in enumerate(zip(expected, actual, strict=True)):
        yield from state_differences(one, other, f"{path}[{index}]")


def _tensor_differences(expected: torch.Tensor, actual: torch.Tensor, path: str) -> Iterator[str]:
    if (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
        yield f"{path}: {actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        return
    unequal = (_element_bytes(expected) != _element_bytes(actual)).any(dim=1)
    if unequal.any():
        first = int(unequal.nonzero()[0])
        yield f"{path}: {int(unequal.sum())} of {unequal.numel()} elements differ, the first at flat index {first}"


def _element_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as uint8, one row per element."""
    return bits_of(tensor.cpu()).reshape(tensor.numel(), tensor.element_size())
