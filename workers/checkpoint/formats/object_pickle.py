"""How an object of the state is pickled: an archive like those of ``torch.save``, which ``torch.load`` reads.

It differs from ``torch.save`` in four ways.

- Nothing depends on settings of the process (``torch.utils.serialization.config``).
- A tensor whose storage was freed or shrunk is refused; ``torch.save`` writes it, and nothing can load it.
- A ``deque`` and a ``defaultdict`` are pickled as calls of their class: so ``weights_only`` rules can load them.
- A large numpy array is a call of ``numpy.asarray`` with a tensor, whose bytes are a record of the archive. pickle would
  make a text of it, one and a half times as long, in four copies.

Most objects have no tensors. They are pickled without a call of Python code per element, which makes a list of a million
numbers fifty times as fast.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import defaultdict, deque
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from stager.workers.checkpoint.formats.pickle_template import PROTOCOL
from stager.workers.checkpoint.formats.zip_records import archive
from stager.workers.memory.pages import bytes_at
from stager.workers.memory.tensor_memory import problem_of

SMALL_RECORDS = (("byteorder", sys.byteorder.encode()), ("version", b"3\n"))  # torch.save writes 3 since torch 1.6


_LARGE_ARRAY_BYTES = 1 << 20
_ARRAY_DTYPES = frozenset(
    np.dtype(name)
    for name in (
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    )
)  # those of which every torch has tensors; in the host's byte order


class PickledObject(NamedTuple):
    """An object's archive, and the classes of its parts, those of Python's own containers and numbers excepted."""

    blob: bytes
    kinds: set[type]


class _HasTensorError(Exception):
    """Stops the pickler that is fast: the object has tensors."""


class _Pickler(pickle.Pickler):
    """Pickles an object without tensors.

    Attributes:
        kinds: the classes of its parts, those of Python's own containers and numbers excepted.
    """

    def __init__(self, file: io.BytesIO, *, exact: bool) -> None:
        super().__init__(file, PROTOCOL)
        self.kinds: set[type] = set()
        self._exact = exact

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (torch.Tensor, torch.UntypedStorage, torch.storage.TypedStorage)):
            self.check_tensor(obj)
        kind = type(obj)
        self.kinds.add(obj if kind is type else kind)
        if self._exact:
            return NotImplemented
        if kind is np.ndarray and _is_large(obj):
            return self.array(obj)
        if kind is deque:
            return deque, (list(obj),) if obj.maxlen is None else (list(obj), obj.maxlen)
        if kind is defaultdict:
            return defaultdict, (obj.default_factory, dict(obj))
        return NotImplemented

    def check_tensor(self, obj: Any) -> None:
        raise _HasTensorError

    def array(self, array: np.ndarray[Any, Any]) -> Any:
        raise _HasTensorError


class _TensorPickler(_Pickler):
    """Pickles any object. Its storage keys begin with ``prefix``, which no other object of the state has.

    Attributes:
        storages: the object's storages, by key.
    """

    def __init__(self, file: io.BytesIO, prefix: str, *, exact: bool) -> None:
        super().__init__(file, exact=exact)
        self.storages: dict[str, torch.UntypedStorage] = {}
        self._prefix = prefix
        self._keys: dict[tuple[int, Any], str] = {}

    def check_tensor(self, obj: Any) -> None:
        if isinstance(obj, torch.Tensor) and (problem := problem_of(obj)) is not None:
            raise pickle.PicklingError(f"a tensor in it {problem}")

    def array(self, array: np.ndarray[Any, Any]) -> Any:
        return np.asarray, (torch.from_numpy(array),)

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        kind: Any
        if isinstance(obj, torch.storage.TypedStorage):
            typed: Any = obj  # what torch's own pickler calls of it has no types
            kind, size, storage = getattr(torch, typed._pickle_storage_type()), typed._size(), typed._untyped_storage
        elif isinstance(obj, torch.UntypedStorage):
            kind, size, storage = torch.UntypedStorage, obj.nbytes(), obj
        else:
            return None
        # Not a string of one character, which Python has only once: the cache would mix it up with the user's.
        key = self._keys.setdefault((storage._cdata, kind), f"{self._prefix}.{len(self._keys)}")
        self.storages[key] = storage
        return "storage", kind, key, torch.serialization.location_tag(storage), size


def _is_large(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array is large, and a tensor can be over its memory."""
    flags = array.flags
    return (
        array.nbytes >= _LARGE_ARRAY_BYTES
        and array.dtype in _ARRAY_DTYPES
        and flags.writeable
        and (flags.c_contiguous or flags.f_contiguous)
    )


def pickle_object(value: object, leaf: int, *, with_tensors: bool = True) -> PickledObject:
    """Pickle an object.

    Args:
        leaf: number of the object in its state. The names of its storages, ``data/o<leaf>.0`` and so on, begin with it.
        with_tensors: False: raise if it has any.

    Raises:
        Exception: whatever ``pickle`` and the object's own methods raise.
    """
    try:
        return _pickle(value, f"o{leaf}", with_tensors, exact=False)
    except RecursionError:  # a deque in itself, for example, is no argument of its class
        return _pickle(value, f"o{leaf}", with_tensors, exact=True)


def _pickle(value: object, prefix: str, with_tensors: bool, *, exact: bool) -> PickledObject:
    buffer = io.BytesIO()
    try:
        fast = _Pickler(buffer, exact=exact)
        fast.dump(value)
        return PickledObject(archive([("data.pkl", buffer.getbuffer()), *SMALL_RECORDS]), fast.kinds)
    except _HasTensorError:
        if not with_tensors:
            raise
    buffer = io.BytesIO()
    pickler = _TensorPickler(buffer, prefix, exact=exact)
    pickler.dump(value)
    records: list[tuple[str, bytes | memoryview]] = [("data.pkl", buffer.getbuffer())]
    kept: list[torch.UntypedStorage] = []
    for key, storage in pickler.storages.items():
        on_host = cast(Any, storage).cpu()
        records.append((f"data/{key}", bytes_at(on_host.data_ptr(), on_host.nbytes())))
        kept.append(on_host)
    return PickledObject(archive([*records, *SMALL_RECORDS]), pickler.kinds)
