"""A state dict on its way to another process and back: its structure as bytes, its storages as numbers.

    trainer                                             worker
    pack(state) -> PackedState
        structure -------------------------------->     unpack() -> the state dict, over the storages as mapped here
        storages, in shared memory (``share.py``)       deep copy with offload
    unpack() -> the staged state dict, over       <---- repack() -> structure of the copy
        the storages that were copied

Each direction is one pickle that names nothing but the methods of :class:`_Maker`, so that reading it in a worker runs
no code of the user's. See NOTE [ A worker runs no code of the user's ] in ``parts.py``.

NOTE [ What is packed here, and what by the deep copy ]
The pickle follows aliases, cycles and attributes as a deep copy does. Two things it cannot do: ask an object that copies
itself (``__deepcopy__``) for a copy that has tensors, and say where an error is. Then the deep copy goes first, over the
same storages, so that no tensor is copied. Its result is packed, or its error, with the key path, is raised.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor the functions on them)

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable, Sequence
from copyreg import dispatch_table
from dataclasses import dataclass
from typing import Any

import torch

from stager.workers.errors import InternalError, UnstageableError
from stager.workers.gc_pause import no_collection
from stager.workers.offload.copier import ATOMIC_TYPES, OffloadCopier
from stager.workers.offload.hook_memo import HookMemo
from stager.workers.offload.key_path import LocatedError
from stager.workers.offload.parts import Parts, SharedValue, parts_of
from stager.workers.offload.tensors import (
    Memo,
    Pieces,
    attributes_to_copy,
    rebuild_strided,
    rebuild_subclass,
    take_apart,
)

_ON_META = -1  # in the place of a storage's number
# What the code of an object may raise while it is packed, and what the pickle says of it.
_PACK_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, pickle.PickleError, copy.Error)


@dataclass(frozen=True, slots=True)
class PackedState:
    """A state dict, taken apart.

    Attributes:
        structure: the containers, keys and values, as a pickle for :func:`unpack`.
        storages: of the tensors, each once. Strong references: they live until the copy is made.
        shared: what the copy shares with the source, by number.
    """

    structure: bytes
    storages: tuple[torch.UntypedStorage, ...]
    shared: tuple[Any, ...]


def pack(state: Any) -> PackedState:
    """Take a state dict apart. Nothing is copied but its plain values.

    Raises:
        UnstageableError: something in it cannot be copied; ``key_path`` names it.
    """
    with torch.inference_mode(False), torch.no_grad(), no_collection():
        try:
            return _Packer().pack(state)
        except _PACK_ERRORS:
            pass
        # See NOTE [ What is packed here, and what by the deep copy ].
        copier = _StructureCopier()
        private = copier.deepcopy_with_tensor_offload(state)
        try:
            return _PrivatePacker(copier.returned).pack(private)
        except _PACK_ERRORS as error:
            reason = f"it cannot be sent to a worker: {type(error).__name__}: {error}"
            raise UnstageableError("state_dict", reason) from error


def repack(state: Any, storages: Sequence[torch.UntypedStorage]) -> bytes:
    """In a worker: take the copy of an unpacked state dict apart again.

    Args:
        storages: of the copy; numbered as those of the source were.
    """
    with no_collection():
        return _Repacker(storages).pack(state)


def list_of_storages(numbers: Sequence[int]) -> bytes:
    """Return the structure of a list of storages: a worker's share, if another one has the state dict itself."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dump([_Numbered(number) for number in numbers])
    return file.getvalue()


def unpack(structure: bytes, storages: Sequence[torch.UntypedStorage], shared: Callable[[int], Any]) -> Any:
    """Make the state dict.

    Args:
        storages: by number; the tensors lie in them.
        shared: returns what the copy shares with the source, by number.
    """
    with torch.inference_mode(False), torch.no_grad(), no_collection():
        return _Unpickler(io.BytesIO(structure), _Maker(storages, shared)).load()


def path_of(state: Any, value: Any) -> str:
    """Return the key path of a value that a state dict refers to."""
    try:
        _Finder(value).deepcopy_with_tensor_offload(state)
    except UnstageableError as error:
        return error.key_path
    return "state_dict"


class _SameStorages:
    """A StorageStager that copies nothing."""

    def stage(self, storage: torch.UntypedStorage, non_blocking: bool) -> torch.UntypedStorage:
        return storage


class _StructureCopier(OffloadCopier):
    """Deep copies the structure alone: the tensors of the copy lie over the storages of the source.

    Attributes:
        returned: by id, the objects whose ``__deepcopy__`` returned themselves.
    """

    def __init__(self) -> None:
        super().__init__(_SameStorages())
        self.returned: dict[int, object] = {}

    def _copy_by_hook(self, x: Any, hook: Callable[[Memo], Any], memo: Memo, non_blocking: bool) -> Any:
        y = super()._copy_by_hook(x, hook, memo, non_blocking)
        if y is x:
            self.returned[id(x)] = x
        return y


class _Finder(_StructureCopier):
    """A deep copy that fails where it meets a certain value."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def _copy(self, x: Any, memo: Memo, non_blocking: bool) -> Any:
        if x is self._value:
            raise LocatedError("found")
        return super()._copy(x, memo, non_blocking)


# -- what a structure may name: methods of _Maker of the same names ----------------------------------------------------


def _storage(number: int) -> Any: ...
def _meta_storage(nbytes: int) -> Any: ...
def _typed_storage(storage: Any, dtype: Any) -> Any: ...
def _tensor(storage: Any, shared: tuple[Any, ...]) -> Any: ...
def _parameter(storage: Any, shared: tuple[Any, ...]) -> Any: ...
def _dtype(name: str) -> Any: ...
def _shared(number: int) -> Any: ...
def _set_attributes(tensor: Any, attributes: dict[str, Any]) -> None: ...


_NAMED = {_storage, _meta_storage, _typed_storage, _tensor, _parameter, _dtype, _shared, _set_attributes}
_NAMES = {function.__name__ for function in _NAMED}


class _Numbered:
    """Stands for a storage in :func:`list_of_storages`."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _storage, (self._number,)


class _StructurePickler(pickle.Pickler):
    """What both directions have in common: tensors and storages."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, pickle.HIGHEST_PROTOCOL)

    def pack_structure(self, state: Any) -> bytes:
        self.dump(state)
        return self._file.getvalue()

    def number_of(self, storage: torch.UntypedStorage) -> int:
        """Return the number of a storage; ``_ON_META``: it has no bytes, and none."""
        raise NotImplementedError

    def reduce_plain_tensor(self, x: torch.Tensor, pieces: Pieces) -> tuple[Any, ...] | None:
        """Return what makes a strided tensor without a subclass, or a parameter; None: it is neither."""
        make, rebuild, shared = _tensor, pieces.rebuild, pieces.shared
        if rebuild is rebuild_subclass and shared[0] is torch.nn.Parameter:
            make, rebuild, shared = _parameter, shared[1], shared[2]
        if rebuild is not rebuild_strided:
            return None
        (storage,) = pieces.parts
        number = self.number_of(storage)
        args = storage if number == _ON_META else number, shared
        return (make, args, x.__dict__, None, None, _set_attributes) if x.__dict__ else (make, args)

    def reduce_storage(self, x: Any) -> tuple[Any, ...]:
        if isinstance(x, torch.UntypedStorage):
            number = self.number_of(x)
            return (_meta_storage, (x.nbytes(),)) if number == _ON_META else (_storage, (number,))
        return _typed_storage, (x._untyped_storage, x.dtype)


class _Packer(_StructurePickler):
    """In the trainer: packs any state dict."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[torch.UntypedStorage] = []
        self._numbers: dict[int, int] = {}
        self._shared: list[Any] = []
        self._memo = HookMemo()  # of the objects that copy themselves

    def pack(self, state: Any) -> PackedState:
        structure = self.pack_structure(state)
        return PackedState(structure, tuple(self._storages), tuple(self._shared))

    def number_of(self, storage: torch.UntypedStorage) -> int:
        number = self._numbers.get(storage._cdata)
        if number is None:
            if storage.device.type == "meta":
                return _ON_META
            _check_memory(storage)
            number = self._numbers[storage._cdata] = len(self._storages)
            self._storages.append(storage)
        return number

    def reducer_override(self, x: Any) -> Any:  # called for everything but plain containers and values
        cls = type(x)
        if isinstance(x, torch.Tensor):
            return self._reduce_tensor(x)
        if isinstance(x, torch.dtype):
            return _dtype, (str(x).removeprefix("torch."),)
        if (cls is types.FunctionType and x in _NAMED) or x is Parts:
            return NotImplemented
        if cls in ATOMIC_TYPES or issubclass(cls, type):
            return self._share(x)
        if isinstance(x, torch.UntypedStorage | torch.TypedStorage):
            return self.reduce_storage(x)
        return self._reduce_object(x)

    def _share(self, x: Any) -> tuple[Any, ...]:
        self._shared.append(x)
        return _shared, (len(self._shared) - 1,)

    def _reduce_tensor(self, x: torch.Tensor) -> tuple[Any, ...]:
        if type(x) is torch.Tensor:
            pieces = take_apart(x)
            return self.reduce_plain_tensor(x, pieces) or self._reduce_pieces(x, pieces)
        with torch._C.DisableTorchFunctionSubclass():
            pieces = take_apart(x)
            x._clear_non_serializable_cached_data()
            return self.reduce_plain_tensor(x, pieces) or self._reduce_pieces(x, pieces)

    def _reduce_pieces(self, x: torch.Tensor, pieces: Pieces) -> tuple[Any, ...]:
        """Have a tensor of another kind travel as ``Parts``, in which the tensors are plain."""
        # Which attributes come with rebuilding, only rebuilding tells.
        attributes = dict(attributes_to_copy(x, pieces.rebuild(pieces.shared, *pieces.parts)))
        args = _Given(pieces.shared), *pieces.parts
        return parts_of((pieces.rebuild, args, attributes or None, None, None, _set_each_attribute))

    def _reduce_object(self, x: Any) -> tuple[Any, ...]:
        if isinstance(x, _Given):
            return self._share(x.value)
        if isinstance(x, types.MethodType):
            return parts_of((type(x), (x.__func__, x.__self__)))
        hook = getattr(x, "__deepcopy__", None)
        return self._reduce_parts(x) if hook is None else self._reduce_hooked(x, hook)

    def _reduce_hooked(self, x: Any, hook: Callable[[Memo], Any]) -> tuple[Any, ...]:
        if self._memo.find(x):
            raise _CopiesItself
        if id(x) not in self._memo:
            self._memo[id(x)] = hook(self._memo)
        return self._share(self._memo[id(x)])  # its copy has no tensors, and is made: no worker has to see it

    def _reduce_parts(self, x: Any) -> tuple[Any, ...]:
        reductor = dispatch_table.get(type(x))
        reduced = reductor(x) if reductor is not None else x.__reduce_ex__(4)
        return self._share(x) if isinstance(reduced, str) else parts_of(reduced)


class _PrivatePacker(_Packer):
    """Packs the result of :class:`_StructureCopier`: objects that copy themselves have done so.

    Args:
        returned: those that returned themselves.
    """

    def __init__(self, returned: dict[int, object]) -> None:
        super().__init__()
        self._returned = returned

    def _reduce_hooked(self, x: Any, hook: Callable[[Memo], Any]) -> tuple[Any, ...]:
        return self._share(x) if id(x) in self._returned else self._reduce_parts(x)


class _Repacker(_StructurePickler):
    """In a worker: packs the copy of what was unpacked there."""

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        super().__init__()
        self._numbers = {storage._cdata: number for number, storage in enumerate(storages)}

    def pack(self, state: Any) -> bytes:
        return self.pack_structure(state)

    def number_of(self, storage: torch.UntypedStorage) -> int:
        return _ON_META if storage.device.type == "meta" else self._numbers[storage._cdata]

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            reduced = self.reduce_plain_tensor(x, take_apart(x))
            if reduced is None:
                raise InternalError(f"a worker found a {type(x).__name__} in its task, and the trainer sends none")
            return reduced
        if isinstance(x, torch.dtype):
            return _dtype, (str(x).removeprefix("torch."),)
        if isinstance(x, SharedValue):
            return _shared, (x.number,)
        if isinstance(x, Parts):
            return x.as_reduced()
        if isinstance(x, torch.UntypedStorage | torch.TypedStorage):
            return self.reduce_storage(x)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Reads a structure. It finds the methods of a maker, and nothing else."""

    def __init__(self, file: io.BytesIO, maker: _Maker) -> None:
        super().__init__(file)
        # Not methods of this object: it remembers what it has found and made, and would be a cycle with all the tensors.
        self._maker = maker

    def find_class(self, module: str, name: str) -> Any:
        if name == Parts.__name__:
            return Parts
        if name not in _NAMES:
            raise InternalError(f"a structure names {module}.{name}, which it cannot")
        return getattr(self._maker, name)


class _Maker:
    """Makes what a structure names.

    Args:
        storages: by number.
        shared: returns what the copy shares with the source, by number.
    """

    def __init__(self, storages: Sequence[torch.UntypedStorage], shared: Callable[[int], Any]) -> None:
        self._storages = storages
        self._shared = shared  # called by its name in the structure, like the methods

    def _storage(self, number: int) -> torch.UntypedStorage:
        return self._storages[number]

    def _meta_storage(self, nbytes: int) -> torch.UntypedStorage:
        return torch.UntypedStorage(nbytes, device="meta")

    def _typed_storage(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
        return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def _tensor(self, where: int | torch.UntypedStorage, shared: tuple[Any, ...]) -> torch.Tensor:
        return rebuild_strided(shared, self._storages[where] if isinstance(where, int) else where)

    def _parameter(self, where: int | torch.UntypedStorage, shared: tuple[Any, ...]) -> torch.Tensor:
        y = self._tensor(where, shared)
        parameter: torch.Tensor = torch.Tensor._make_subclass(torch.nn.Parameter, y, y.requires_grad)
        return parameter

    def _dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def _set_attributes(self, tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
        _set_each_attribute(tensor, attributes)


class _CopiesItself(TypeError):
    """An object has a ``__deepcopy__``, and tensors behind it. Never leaves :func:`pack`."""


class _Given:
    """Wraps a value that is shared whatever it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _set_each_attribute(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(tensor, name, value)


def _check_memory(storage: torch.UntypedStorage) -> None:
    """Refuse a storage without memory; the deep copy then says where it is."""
    if storage.nbytes() and storage.data_ptr() == 0:
        raise ValueError("a storage without memory")
