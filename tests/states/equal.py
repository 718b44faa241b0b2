"""One strict equality: every way in which a loaded value differs from the one that was wanted.

Two values are equal if they have the same type, the same content, the same flags, and the same pattern of sharing: what is
one object, or one storage, on one side is one on the other.
"""

from __future__ import annotations

import math
import struct
import types
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch

from tests.states import bits

# What torch itself cannot keep when it copies into a target that exists, or what a format of plain tensors has no word for.
IN_PLACE = frozenset({"stride", "requires_grad", "sharing", "attributes", "tensor type", "layout flags", "key order"})
VALUES_ONLY = IN_PLACE | {"mapping type"}

_ATOMS = (
    str,
    bytes,
    bytearray,
    int,
    complex,
    type(None),
    Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type(NotImplemented), type(...))
_MAX_PROBLEMS = 20


def differences(got: Any, want: Any, ignored: frozenset[str] = frozenset()) -> list[str]:
    """List what differs, one line each: ``aspect at path: got ..., not ...``.

    Args:
        ignored: aspects that need not be equal.
    """
    comparison = _Comparison(ignored)
    comparison.compare(got, want, "state")
    comparison.compare_sharing()
    return comparison.problems[:_MAX_PROBLEMS]


class _Comparison:
    def __init__(self, ignored: frozenset[str]) -> None:
        self.problems: list[str] = []
        self._ignored = ignored
        self._seen: dict[tuple[int, int], str] = {}
        self._alive: list[Any] = []  # ids stay unique while the objects live
        self._objects: list[tuple[int, int, str]] = []  # (got's identity, want's identity, path)
        self._storages: list[tuple[int, int, str]] = []

    def _note(self, aspect: str, path: str, got: Any, want: Any) -> None:
        if aspect not in self._ignored:
            self.problems.append(f"{aspect} at {path}: got {_short(got)}, not {_short(want)}")

    def compare(self, got: Any, want: Any, path: str) -> None:
        """Compare two values and all that is in them."""
        if (id(got), id(want)) in self._seen:
            return
        if isinstance(want, torch.SymInt):  # the ragged length of a nested tensor: a new symbol each time one is made
            return
        if isinstance(want, _FUNCTIONS):
            if got != want:
                self._note("value", path, got, want)
            return
        if not isinstance(want, _ATOMS) and type(want) is not float:
            self._seen[id(got), id(want)] = path
            self._alive += [got, want]
            if isinstance(want, (list, dict, set, torch.Tensor, np.ndarray)) or hasattr(want, "__dict__"):
                self._objects.append((id(got), id(want), path))  # whether an immutable value is shared does not show
        if type(got) is not type(want) and not self._is_other_type(got, want, path):
            return
        self._compare_content(got, want, path)

    def _is_other_type(self, got: Any, want: Any, path: str) -> bool:
        """Note that the types differ. True: they are near enough to go on."""
        both = (got, want)
        if all(isinstance(one, torch.Tensor) for one in both):
            self._note("tensor type", path, type(got), type(want))
            return not any(hasattr(one, "__tensor_flatten__") for one in both)
        if all(isinstance(one, dict) for one in both):
            self._note("mapping type", path, type(got), type(want))
            return True
        self._note("type", path, type(got), type(want))
        return False

    def _compare_content(self, got: Any, want: Any, path: str) -> None:
        if isinstance(want, torch.Tensor):
            self._tensor(got, want, path)
        elif isinstance(want, float) and type(want) is float:
            if struct.pack("d", got) != struct.pack("d", want) and not (math.isnan(got) and math.isnan(want)):
                self._note("value", path, got, want)
        elif type(want) in (int, str, bytes, bytearray, bool, complex, type(None)) or isinstance(want, Enum):
            if got != want or repr(got) != repr(want):
                self._note("value", path, got, want)
        elif isinstance(want, np.ndarray):
            self._array(got, want, path)
        elif isinstance(want, (torch.UntypedStorage, torch.TypedStorage)):
            self._storage(got, want, path)
        elif isinstance(want, dict) and isinstance(got, dict):
            self._mapping(got, want, path)
        elif type(want) in (list, tuple, torch.Size):
            self._sequence(got, want, path)
        elif type(want) in (set, frozenset):
            if got != want:
                self._note("value", path, got, want)
        else:
            self._object(got, want, path)

    def _mapping(self, got: dict[Any, Any], want: dict[Any, Any], path: str) -> None:
        if len(got) != len(want):
            self._note("keys", path, list(got), list(want))
            return
        if list(map(_key, got)) != list(map(_key, want)):
            if sorted(map(_key, got)) != sorted(map(_key, want)):
                self._note("keys", path, list(got), list(want))
                return
            self._note("key order", path, list(got), list(want))
        by_key = {_key(key): value for key, value in got.items()}
        for key, value in want.items():
            self.compare(by_key[_key(key)], value, f"{path}[{key!r:.40}]")
        if type(want) is not dict:
            self._attributes(got, want, path)
            if hasattr(want, "default_factory") and type(got) is type(want):
                self.compare(got.default_factory, want.default_factory, f"{path}.default_factory")

    def _sequence(self, got: Any, want: Any, path: str) -> None:
        if len(got) != len(want):
            self._note("length", path, len(got), len(want))
            return
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            self.compare(one, other, f"{path}[{index}]")

    def _attributes(self, got: Any, want: Any, path: str) -> None:
        mine, theirs = getattr(got, "__dict__", {}), getattr(want, "__dict__", {})
        if mine.keys() != theirs.keys():
            self._note("attributes", path, sorted(mine), sorted(theirs))
        for name in mine.keys() & theirs.keys():
            self.compare(mine[name], theirs[name], f"{path}.{name}")

    def _object(self, got: Any, want: Any, path: str) -> None:
        """Objects are equal if they are taken apart into equal parts."""
        try:
            mine, theirs = _reduced(got), _reduced(want)
        except Exception as error:  # noqa: BLE001  # any class's code; only the values can be asked for then
            if not bool(got == want):
                self._note(f"value ({error!r:.60})", path, got, want)
            return
        if isinstance(mine, str) or isinstance(theirs, str):
            if mine != theirs:
                self._note("value", path, got, want)
            return
        self._alive += [mine, theirs]
        for part, (one, other) in enumerate(zip(mine, theirs, strict=False)):
            self._parts(one, other, f"{path}.<{type(want).__name__} part {part}>")

    def _parts(self, got: Any, want: Any, path: str) -> None:
        """Compare containers that were made for the comparison: what they hold counts, not they themselves."""
        if not got and not want:
            return  # an object without attributes may have None or an empty mapping
        if type(got) is type(want) is tuple or (type(got) is type(want) is list):
            self._sequence(got, want, path)
        elif type(got) is type(want) is dict:
            self._mapping(got, want, path)
        else:
            self.compare(got, want, path)

    # -- tensors, arrays, storages ----------------------------------------------------------------------------------

    def _tensor(self, got: Any, want: Any, path: str) -> None:
        for aspect in ("dtype", "device", "layout", "is_quantized", "is_nested"):
            mine, theirs = getattr(got, aspect), getattr(want, aspect)
            if mine != theirs:
                self._note(aspect, path, mine, theirs)
                return
        if not want.is_nested and got.shape != want.shape:
            self._note("shape", path, tuple(got.shape), tuple(want.shape))
            return
        if got.requires_grad != want.requires_grad:
            self._note("requires_grad", path, got.requires_grad, want.requires_grad)
        self._attributes(got, want, path)
        with torch.no_grad():
            self._tensor_values(got, want, path)

    def _tensor_values(self, got: Any, want: Any, path: str) -> None:
        if hasattr(want, "__tensor_flatten__"):
            (names, context), (others, other_context) = want.__tensor_flatten__(), got.__tensor_flatten__()
            if list(names) != list(others):
                self._note("inner tensors", path, others, names)
                return
            for name in names:
                self.compare(getattr(got, name), getattr(want, name), f"{path}.{name}")
            if not want.is_nested:  # a jagged one's context holds a symbol that no two tensors share
                self._parts(other_context, context, f"{path}.<context>")
        elif want.is_meta:
            pass
        elif want.is_nested:
            self._sequence(list(got.unbind()), list(want.unbind()), path)
        elif want.layout is torch.sparse_coo:
            if got.is_coalesced() != want.is_coalesced():
                self._note("layout flags", path, got.is_coalesced(), want.is_coalesced())
            self._sequence([got._indices(), got._values()], [want._indices(), want._values()], path)
        elif want.layout in _PARTS:
            for name in _PARTS[want.layout]:
                self.compare(getattr(got, name)(), getattr(want, name)(), f"{path}.{name}()")
        elif want.layout is not torch.strided:
            self._sequence([got.to_dense()], [want.to_dense()], path)
        else:
            self._strided(got, want, path)

    def _strided(self, got: Any, want: Any, path: str) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            if _steps(got) != _steps(want):
                self._note("stride", path, got.stride(), want.stride())
            if got.is_conj() != want.is_conj() or got.is_neg() != want.is_neg():
                self._note("layout flags", path, (got.is_conj(), got.is_neg()), (want.is_conj(), want.is_neg()))
            if want.is_quantized:
                if str(got.qscheme()) != str(want.qscheme()) or repr(got) != repr(want):
                    self._note("value", path, got, want)
                return
            if bits(got.as_subclass(torch.Tensor)) != bits(want.as_subclass(torch.Tensor)):
                self._note("value", path, got.flatten()[:6].tolist(), want.flatten()[:6].tolist())
            if want.numel():
                self._storages.append((got.untyped_storage()._cdata, want.untyped_storage()._cdata, path))

    def _array(self, got: Any, want: Any, path: str) -> None:
        if (got.dtype, got.shape, got.strides) != (want.dtype, want.shape, want.strides):
            self._note("array", path, (got.dtype, got.shape, got.strides), (want.dtype, want.shape, want.strides))
        elif want.dtype.hasobject:
            self._sequence(got.ravel().tolist(), want.ravel().tolist(), path)
        elif got.tobytes() != want.tobytes():
            self._note("value", path, got, want)

    def _storage(self, got: Any, want: Any, path: str) -> None:
        if isinstance(want, torch.TypedStorage):
            if got.dtype != want.dtype:
                self._note("dtype", path, got.dtype, want.dtype)
            got, want = got._untyped_storage, want._untyped_storage
        if got.nbytes() != want.nbytes() or list(got) != list(want):
            self._note("value", path, got.nbytes(), want.nbytes())
        self._storages.append((got._cdata, want._cdata, path))

    # -- sharing ----------------------------------------------------------------------------------------------------

    def compare_sharing(self) -> None:
        """What is one object, or one storage, on one side has to be one on the other."""
        for what, pairs in (("object", self._objects), ("storage", self._storages)):
            for side, other, words in ((0, 1, "one {}, two in the oracle"), (1, 0, "two {}s, one in the oracle")):
                partner: dict[int, tuple[int, str]] = {}
                for pair in pairs:
                    known, first = partner.setdefault(pair[side], (pair[other], str(pair[2])))  # type: ignore[arg-type]  # as the test wants it
                    if known != pair[other]:
                        self._note("sharing", f"{first} and {pair[2]}", words.format(what), "the same sharing")


_PARTS = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def _reduced(value: Any) -> Any:
    """The parts that pickle takes a value apart into, with its iterators as lists."""
    getattr(value, "__dict__", None)  # some types make it when it is first asked for, and pickle None before
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return reduced
    return tuple(list(part) if isinstance(part, Iterator) else part for part in reduced)


def _steps(tensor: Any) -> list[int]:
    """The strides that matter: those of dimensions with more than one element."""
    return [step for step, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1 and tensor.numel()]


def _key(key: object) -> str:
    """A key with its type: 1, True and 1.0 are equal as keys. Keys of no text of their own count by their class."""
    if isinstance(key, torch.Tensor):
        return f"Tensor {key.tolist()}"
    return f"{type(key).__name__} {key!r}"


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception as error:  # noqa: BLE001  # any class's __repr__
        text = f"<{type(value).__name__}: {error!r}>"
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."
