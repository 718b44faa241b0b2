"""The deep copy: what ``copy.deepcopy`` does, with every tensor's storage staged once through a strategy object.

    OffloadCopier.deepcopy_with_tensor_offload(x)
      atoms, lists, tuples, dicts, methods        copied here              (_deepcopy_*)
      tensors and storages                        taken apart, rebuilt     (tensors.py)  -> StorageStager.stage
      objects with __deepcopy__                   asked, with our memo     (NOTE [ Objects that copy themselves ])
      everything else                             __reduce_ex__(4)         (_reconstruct)

The method names are those of ``torch.distributed.checkpoint._state_dict_stager.StateDictStager``, which is a subclass on
the trainer's side; workers run the same class over shared sources (``workers/staged_copy/share.py``).
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor its rebuilding functions)

from __future__ import annotations

import copy
import pickle
import types
import weakref
from collections.abc import Callable, Iterable
from copyreg import dispatch_table
from typing import Any, Protocol

import torch

from stager.workers.errors import StagerError, UnstageableError
from stager.workers.offload.hook_memo import HookMemo
from stager.workers.offload.key_path import LocatedError, Segment, at_argument, at_attribute, at_item
from stager.workers.offload.tensors import Memo, offload_tensor

_MISSING = object()
_memo_get = dict.get  # for the engine's own look-ups, which must not make HookMemo stage anything
# What an object's own copying code may raise. Other errors are the engine's or the system's, and pass through.
_HOOK_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, pickle.PickleError, copy.Error)

_VALUE_TYPES = {type(None), type(Ellipsis), type(NotImplemented), int, float, bool, complex, bytes, str, range}
_CODE_TYPES = {type, property, types.CodeType, types.BuiltinFunctionType, types.FunctionType, weakref.ref}
ATOMIC_TYPES = _VALUE_TYPES | _CODE_TYPES | {torch.dtype, torch.layout, torch.memory_format}
_COPIERS = {
    list: "_deepcopy_list",
    tuple: "_deepcopy_tuple",
    dict: "_deepcopy_dict",
    types.MethodType: "_deepcopy_method",
}


class StorageStager(Protocol):
    """Copies storages to where staged bytes live."""

    def stage(self, storage: torch.UntypedStorage, non_blocking: bool) -> torch.UntypedStorage:
        """A CPU storage of the same size that holds, or with ``non_blocking`` will hold, the same bytes."""


class OffloadCopier:
    """Deep copies with tensors offloaded. Not thread-safe.

    Guarantees: the copy shares no memory with the source, except for what ``copy.deepcopy`` shares (functions, types,
    objects whose ``__deepcopy__`` returns themselves); tensors over one storage share one staged storage, with the same
    sizes, strides and offsets; either everything is copied or :class:`UnstageableError` names what could not be.
    """

    def __init__(self, storages: StorageStager) -> None:
        self._storages = storages

    def deepcopy_with_tensor_offload(
        self, x: Any, memo: Memo | None = None, _nil: Any = None, non_blocking: bool = False
    ) -> Any:
        """Deep copy ``x``; the copies of its tensors lie in the host memory that the ``StorageStager`` provides.

        Args:
            x: any object.
            memo: what was copied before, as for ``copy.deepcopy``. With one memo for several objects, the copies share what
                the objects share.
            _nil: unused; torch's signature has it.
            non_blocking: copies from a device may still be under way on return; the caller synchronises.

        Raises:
            UnstageableError: something in ``x`` cannot be copied; ``key_path`` names it.
        """
        if memo is None:
            memo = HookMemo()
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._copy(x, memo, non_blocking)
        except LocatedError as error:
            failure = error.resolve()
        # Outside of the except clause: otherwise the traceback would also show the LocatedError, which is internal.
        raise failure

    def _copy(self, x: Any, memo: Memo, non_blocking: bool) -> Any:
        cls = type(x)
        if cls in ATOMIC_TYPES:
            return x
        y = _memo_get(memo, id(x), _MISSING)
        if y is not _MISSING:
            return y
        if isinstance(x, torch.Tensor):
            y = self._offload_tensor(x, memo, non_blocking)
        elif (name := _COPIERS.get(cls)) is not None:
            y = getattr(self, name)(x, memo, non_blocking)
        elif issubclass(cls, type):
            return x
        elif isinstance(x, torch.UntypedStorage | torch.TypedStorage):
            y = self._copy_storage(x, memo, non_blocking)
        else:
            y = self._copy_object(x, memo, non_blocking)
        if y is not x:
            memo[id(x)] = y
            self._keep_alive(x, memo)
        return y

    def _deepcopy_list(self, x: list[Any], memo: Memo, non_blocking: bool) -> list[Any]:
        y: list[Any] = []
        memo[id(x)] = y
        self._copy_each(x, y, memo, non_blocking)
        return y

    def _deepcopy_tuple(self, x: tuple[Any, ...], memo: Memo, non_blocking: bool) -> tuple[Any, ...]:
        y: list[Any] = []
        self._copy_each(x, y, memo, non_blocking)
        copied: tuple[Any, ...] | None = _memo_get(memo, id(x))
        if copied is not None:  # the tuple is part of a cycle that came back to it
            return copied
        return tuple(y) if any(old is not new for old, new in zip(x, y, strict=True)) else x

    def _deepcopy_dict(self, x: dict[Any, Any], memo: Memo, non_blocking: bool) -> dict[Any, Any]:
        y: dict[Any, Any] = {}
        memo[id(x)] = y
        self._copy_pairs(x.items(), y, memo, non_blocking)
        return y

    def _copy_each(
        self, items: Iterable[Any], y: Any, memo: Memo, non_blocking: bool, segment: Callable[[int], Segment] = at_item
    ) -> None:
        """Append the copies of ``items`` to ``y``, one by one: a cycle that comes back to ``y`` finds those made so far."""
        index = 0
        try:
            for index, item in enumerate(items):  # noqa: B007  (for the path of an error)
                y.append(self._copy(item, memo, non_blocking))
        except LocatedError as error:
            error.prepend(segment(index))
            raise

    def _copy_pairs(self, pairs: Iterable[tuple[Any, Any]], y: Any, memo: Memo, non_blocking: bool) -> None:
        key = None
        try:
            for key, value in pairs:
                y[self._copy(key, memo, non_blocking)] = self._copy(value, memo, non_blocking)
        except LocatedError as error:
            error.prepend(at_item(key))
            raise

    def _deepcopy_method(self, x: types.MethodType, memo: Memo, non_blocking: bool) -> types.MethodType:
        try:
            return type(x)(x.__func__, self._copy(x.__self__, memo, non_blocking))
        except LocatedError as error:
            error.prepend(at_attribute("__self__"))
            raise

    def _offload_tensor(self, x: torch.Tensor, memo: Memo, non_blocking: bool = False) -> torch.Tensor:
        """Return a CPU copy of a tensor over staged storage, and enter it into ``memo``."""
        try:
            return offload_tensor(self, x, memo, non_blocking)
        except NotImplementedError as error:  # from torch's dispatcher: this kind of tensor lacks an operation
            raise LocatedError(_describe_failure(x, error)) from error

    def _stage_untyped_storage(self, storage: torch.UntypedStorage, non_blocking: bool = False) -> torch.UntypedStorage:
        return self._storages.stage(storage, non_blocking)

    def _staged_storage(self, storage: torch.UntypedStorage, memo: Memo, non_blocking: bool) -> torch.UntypedStorage:
        """Return the staged copy of ``storage``; it is staged once in each copy of a state."""
        staged: torch.UntypedStorage | None = _memo_get(memo, id(storage))
        if staged is None:
            if storage.device.type == "meta":
                staged = torch.UntypedStorage(storage.nbytes(), device="meta")
            elif storage.nbytes() and not _has_memory(storage):
                raise LocatedError(
                    "its storage has no memory (it is a fake, functional or wrapped tensor); "
                    "replace it with a real tensor, or leave it out of the state"
                )
            else:
                staged = self._stage_untyped_storage(storage, non_blocking)
            memo[id(storage)] = staged
            self._keep_alive(storage, memo)
        return staged

    def _copy_storage(
        self, x: torch.UntypedStorage | torch.TypedStorage, memo: Memo, non_blocking: bool
    ) -> torch.UntypedStorage | torch.TypedStorage:
        if isinstance(x, torch.UntypedStorage):
            return self._staged_storage(x, memo, non_blocking)
        staged = self._staged_storage(x._untyped_storage, memo, non_blocking)
        return torch.TypedStorage(wrap_storage=staged, dtype=x.dtype, _internal=True)

    def _copy_object(self, x: Any, memo: Memo, non_blocking: bool) -> Any:
        hook = getattr(x, "__deepcopy__", None)
        if hook is not None:
            return self._copy_by_hook(x, hook, memo, non_blocking)
        with _located(x):
            reductor = dispatch_table.get(type(x))
            reduced = reductor(x) if reductor is not None else x.__reduce_ex__(4)
        if isinstance(reduced, str):
            return x
        return self._reconstruct(x, reduced, memo, non_blocking)

    def _copy_by_hook(self, x: Any, hook: Callable[[Memo], Any], memo: Memo, non_blocking: bool) -> Any:
        """The steps of NOTE [ Objects that copy themselves ] in ``hook_memo.py``."""
        hook_memo = memo if isinstance(memo, HookMemo) else HookMemo(memo.items())
        num_found = hook_memo.find(x)
        with hook_memo.staging(self, non_blocking), _located(x):
            y = hook(hook_memo)
        if y is not x and num_found:
            self._adopt(hook_memo, y, non_blocking)
        if hook_memo is not memo:
            memo.update(hook_memo)
        return y

    def _adopt(self, memo: HookMemo, y: Any, non_blocking: bool) -> None:
        """Move tensors that ``__deepcopy__`` made by itself into staged memory; they stay the same objects."""
        for stranger in memo.strangers(y):
            if isinstance(stranger, torch.Tensor) and type(stranger) in (torch.Tensor, torch.nn.Parameter):
                stranger.data = self._copy(stranger.detach(), memo, non_blocking)
            elif stranger.device.type not in ("cpu", "meta"):
                raise LocatedError(
                    f"the __deepcopy__ of a {type(y).__name__} makes a {type(stranger).__name__} on "
                    f"{stranger.device}, which cannot be moved; let it use copy.deepcopy(x, memo)"
                )

    def _reconstruct(self, x: Any, reduced: tuple[Any, ...], memo: Memo, non_blocking: bool) -> Any:
        """Build an object from the two to six items of ``__reduce_ex__``."""
        func, args, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        args = self._copy_arguments(x, args, memo, non_blocking)
        with _located(x):
            y = func(*args)
        memo[id(x)] = y  # before its contents: they may refer to the object
        if state is not None:
            state = self._copy_state(state, memo, non_blocking)
            with _located(x):
                _set_state(y, state, setter)
        if items is not None:
            self._copy_each(items, y, memo, non_blocking)
        if pairs is not None:
            self._copy_pairs(pairs, y, memo, non_blocking)
        return y

    def _copy_arguments(self, x: Any, args: tuple[Any, ...], memo: Memo, non_blocking: bool) -> tuple[Any, ...]:
        def segment(index: int) -> Segment:
            fields = getattr(x, "_fields", None) if isinstance(x, tuple) else None
            return (
                at_attribute(fields[index - 1]) if fields and index > 0 else at_argument(index)
            )  # the class comes first

        copied: list[Any] = []
        self._copy_each(args, copied, memo, non_blocking, segment)
        return tuple(copied)

    def _copy_state(self, state: Any, memo: Memo, non_blocking: bool) -> Any:
        try:
            return self._copy(state, memo, non_blocking)
        except LocatedError as error:
            error.enter_object(has_slots=isinstance(state, tuple) and len(state) == 2)
            raise

    def _keep_alive(self, x: Any, memo: Memo) -> None:
        # The keys of the memo are ids: if ``x`` were freed, another object could get its id. copy.deepcopy uses this key.
        kept = _memo_get(memo, id(memo))
        if kept is None:
            memo[id(memo)] = [x]
        else:
            kept.append(x)


class _located:
    """Turns what the code of ``x`` raises into a :class:`LocatedError` that names its type."""

    __slots__ = ("_x",)

    def __init__(self, x: object) -> None:
        self._x = x

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        ours = isinstance(error, StagerError) and not isinstance(error, UnstageableError)
        if ours or isinstance(error, LocatedError | RecursionError | torch.OutOfMemoryError):
            return
        if isinstance(error, _HOOK_ERRORS):
            raise LocatedError(_describe_failure(self._x, error)) from error


def _has_memory(storage: torch.UntypedStorage) -> bool:
    try:
        return storage.data_ptr() != 0
    except RuntimeError:  # what torch raises inside functional and fake tensors
        return False


def _describe_failure(x: object, error: BaseException) -> str:
    return (
        f"a {type(x).__module__}.{type(x).__qualname__} cannot be copied: {type(error).__name__}: {error}; leave it out, or "
        "stage values that it can be made from"
    )


def _set_state(y: Any, state: Any, setter: Callable[[Any, Any], Any] | None) -> None:
    if setter is not None:
        setter(y, state)
        return
    if hasattr(y, "__setstate__"):
        y.__setstate__(state)
        return
    slots = None
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state
    if state is not None:
        y.__dict__.update(state)
    for name, value in (slots or {}).items():
        setattr(y, name, value)
