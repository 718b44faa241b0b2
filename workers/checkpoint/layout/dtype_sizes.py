"""The element sizes of dtypes, by name. Workers need them and start without torch."""

from __future__ import annotations

# The dtypes that every supported torch has. For any other name, torch decides.
SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}


def itemsize_of(name: str) -> int:
    """Return the bytes of one element of the dtype called ``name`` ("float32").

    Raises:
        ValueError: this torch has no dtype of that name, or its tensors are more than raw bytes.
    """
    size = SIZES.get(name) if isinstance(name, str) else None
    if size is None:
        from stager.workers.checkpoint.layout.dtypes import dtype_of

        return dtype_of(name).itemsize
    return size
