"""What the ranks compare: every plain tensor, on any device, whatever its dtype and strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stager.ranks.digests import digests_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int64, torch.uint16)
_RARE = (torch.complex64, torch.complex128, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2)


def _digest(value: Any) -> str | None:
    digests = digests_of({"x": value})
    return digests.tensors.get("x", digests.others.get("x"))


def test_one_element_counts_whatever_its_stride() -> None:
    memory = torch.arange(4)
    assert memory[::2][:1].stride() == (2,)  # torch does not view it as bytes
    assert _digest(memory[::2][:1]) == _digest(torch.zeros(1, dtype=torch.int64)) != _digest(memory[1:][::2][:1])


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("numel", [1, 2048, 100_003])
@pytest.mark.parametrize("dtype", [*_DTYPES, *_RARE], ids=str)
def test_values_of_every_dtype_and_length_count(dtype: torch.dtype, numel: int) -> None:
    value = (torch.arange(numel) % 2).to(dtype)
    assert _digest(value) == _digest(value.clone())
    assert _digest(value) != _digest(torch.ones(numel).sub(torch.arange(numel) % 2).to(dtype))


def test_strides_do_not_count_and_values_do() -> None:
    value = torch.arange(60_000.0).reshape(200, 300)
    transposed = value.t().contiguous().t()
    assert transposed.stride() != value.stride()
    assert _digest(value) == _digest(transposed)
    assert _digest(value) != _digest(value.t())
    assert _digest(torch.ones(3).expand(50_000, 3)) == _digest(torch.ones(50_000, 3))
    lazy = torch.view_as_complex(torch.rand(5_000, 2)).conj()
    assert _digest(lazy) == _digest(lazy.resolve_conj())


@pytest.mark.parametrize("part", [slice(0, 4096), slice(50_000, 54_096), slice(95_904, 100_000)])
def test_a_stretch_that_differs_anywhere_is_seen(part: slice) -> None:
    value = torch.zeros(100_000)
    other = value.clone()
    other[part] = 1
    assert _digest(value) != _digest(other)


def test_one_column_that_differs_is_seen() -> None:
    """Places are not all in one column, whatever the number of rows."""
    for rows in (1000, 1024, 4096):
        value = torch.zeros(rows, 64)
        other = value.clone()
        other[:, 37] = 1
        assert _digest(value) != _digest(other)


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:.*quantize_per_tensor", "ignore:.*deprecated")
def test_what_has_no_values_in_memory_is_not_read() -> None:
    freed = torch.ones(100)
    freed.untyped_storage().resize_(0)
    shrunk = torch.ones(100_000)
    shrunk.untyped_storage().resize_(4096)
    for value in (freed, shrunk, torch.empty(3, device="meta"), torch.empty(0), torch.eye(3).to_sparse(), object()):
        assert _digest(value) is None
    for value in (
        torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ):
        assert _digest(value) is None


def test_statistics_of_batches_differ_by_design() -> None:
    values = {"model.bn.running_mean": torch.ones(3), "model.bn.weight": torch.ones(3), "epoch": 3}
    digests = digests_of(values)
    assert list(digests.tensors) == ["model.bn.weight"]
    assert list(digests.others) == ["epoch", "model.bn.running_mean"]


class _Cats(TorchDispatchMode):
    """Keeps the sizes of what is put together before it is brought to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.cat.default:
            self.nbytes.append(made.nbytes)
        return made


def test_only_samples_leave_a_device_and_all_of_one_device_at_once() -> None:
    values = {"large": torch.rand(100_000), "other": torch.rand(300, 300).t(), "small": torch.ones(5)}
    with _Cats() as cats:
        digests = digests_of(values)
    assert set(digests.tensors) == set(values)
    assert cats.nbytes == [4 * (1024 + 1024 + 5)]
