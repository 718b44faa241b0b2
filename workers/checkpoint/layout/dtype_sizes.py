"""The element sizes of dtypes, by name. Workers need them and start without torch."""

from __future__ import annotations

# The dtypes that every supported torch has, by bytes. For any other name, torch decides.
_BY_SIZE = {
    1: "bool uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz",
    2: "uint16 int16 float16 bfloat16",
    4: "uint32 int32 float32 complex32",
    8: "uint64 int64 float64 complex64",
    16: "complex128",
}
SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}


def itemsize_of(name: str) -> int:
    """Return the bytes of one element of the dtype called ``name`` ("float32").

    Raises:
        ValueError: this torch has no dtype of that name, or its tensors are more than raw bytes.
    """
    if isinstance(name, str) and (size := SIZES.get(name)):
        return size
    from stager.workers.checkpoint.layout.dtypes import dtype_of

    return dtype_of(name).itemsize
