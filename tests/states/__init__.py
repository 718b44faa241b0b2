"""States for tests: every kind of tensor, and comparing bit for bit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random bits: every NaN and denormal there is."""
    count = 1
    for length in shape:
        count *= length
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def bits(tensor: torch.Tensor) -> bytes:
    """The values of a tensor as bytes, in row-major order."""
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype)  # a single element may have any stride and be contiguous
    dense.copy_(tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1))
    return bytes(dense.view(torch.uint8).numpy()) if dense.numel() else b""


def same(first: Any, second: Any) -> bool:
    """Equal in structure, types of leaves, shapes, dtypes and bits. Mappings compare as mappings."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
            return False
        if first.layout is not torch.strided or first.is_quantized:
            return first.layout == second.layout and torch.equal(first.to_dense(), second.to_dense())
        return first.dtype == second.dtype and first.shape == second.shape and bits(first) == bits(second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return (
            type(first) is type(second)
            and len(first) == len(second)
            and all(same(a, b) for a, b in zip(first, second, strict=True))
        )
    return type(first) is type(second) and bool(first == second)


def everything(seed: int = 0) -> dict[str, Any]:
    """One of each: dtypes, shapes, strides, views, ties, nested containers, plain objects."""
    generator = torch.Generator().manual_seed(seed)
    base = random_tensor(torch.float32, (6, 8), generator)
    tied = random_tensor(torch.float32, (5, 3), generator)
    return {
        "dtypes": {str(dtype): random_tensor(dtype, (3, 5), generator) for dtype in DTYPES},
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, dtype=torch.int16),
        "empty_shaped": torch.empty(4, 0, 3),
        "transposed": base.t(),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "row": base[2],
        "column": base[:, 3],
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(4, 8),
        "overlapping": [base[1:4], base[3:6]],
        "conj": torch.complex(base, base).conj(),
        "neg": torch.complex(base, base).conj().imag,
        "tied": {"a": tied, "b": tied},
        "ordered": OrderedDict(z=torch.ones(2), a=torch.zeros(1, dtype=torch.int64)),
        "ints": {0: torch.arange(3), 7: {"x": torch.arange(2), "flag": True}},
        "list": [1, torch.arange(4), {"k": None}],
        "tuple": (1, "two", 3.0),
        "plain": {"none": None, "text": "grüße", "big": 2**80, "float": -0.0, "bytes": b"\0\xff", "empty": {}},
        "sparse": torch.eye(3).to_sparse(),
        "quantized": _quantized(torch.randn(4, generator=generator)),
    }


def _quantized(values: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():  # torch deprecates them; checkpoints of them exist
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(values, 0.1, 3, torch.qint8)
