"""Floating-point tensors in another dtype: which ones, and their bytes, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from stager.workers.errors import UnstageableError, UsageError
from stager.workers.memory.pages import bytes_at

DTYPES = ("float64", "float32", "float16", "bfloat16")
"""What is converted, and to what. Tensors of 8 bits and less stay as they are: their scales are tensors of their own."""

_PIECE_BYTES = 1 << 20


def dtype_named(dtype: str | torch.dtype | None) -> str | None:
    """Return the name of the dtype that the caller asks for; None: none.

    Raises:
        UsageError: floating-point tensors cannot be converted to it.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype (--dtype) is {dtype!r}; weights can be converted to {', '.join(DTYPES)}")
    return name


def dtype_in_file(stored: str, wanted: str | None) -> str:
    """Return the dtype that a tensor has in the exported file.

    Args:
        stored: its dtype in the checkpoint.
        wanted: see :func:`dtype_named`.
    """
    return wanted if wanted is not None and stored in DTYPES else stored


def converted(data: Iterable[memoryview], source: torch.dtype, target: torch.dtype, name: str) -> Iterator[memoryview]:
    """Yield the raw bytes of a tensor in another dtype. What was yielded is valid until the next one is asked for.

    Args:
        data: the raw bytes; a chunk may end in the middle of an element.
        name: of the tensor, for the message.

    Raises:
        UnstageableError: a finite value becomes infinite.
    """
    for elements in _whole_elements(data, source.itemsize):
        for start in range(0, len(elements), _PIECE_BYTES):
            piece = elements[start : start + _PIECE_BYTES]
            values = torch.empty(len(piece) // source.itemsize, dtype=source, device="cpu")
            bytes_at(values.data_ptr(), len(piece))[:] = piece
            result = values.to(target)
            if _overflows(values, result):
                limit = torch.finfo(target).max
                raise UnstageableError(
                    name, f"has values beyond {limit:g}, the largest of {target}; export it with another dtype"
                )
            yield bytes_at(result.data_ptr(), result.nbytes)


def _overflows(values: torch.Tensor, result: torch.Tensor) -> bool:
    if torch.finfo(result.dtype).max >= torch.finfo(values.dtype).max:
        return False
    infinite = result.isinf()
    return bool(infinite.any()) and not torch.equal(infinite, values.isinf())


def _whole_elements(data: Iterable[memoryview], itemsize: int) -> Iterator[memoryview]:
    """Cut the bytes at the boundaries of elements."""
    rest = bytearray()  # the beginning of an element
    for chunk in data:
        lacking = min(len(chunk), -len(rest) % itemsize)
        if rest:
            rest += chunk[:lacking]
            if len(rest) < itemsize:
                continue
            yield memoryview(bytes(rest))
        end = len(chunk) - (len(chunk) - lacking) % itemsize
        if end > lacking:
            yield chunk[lacking:end]
        rest = bytearray(chunk[end:])
