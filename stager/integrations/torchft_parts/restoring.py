"""From a snapshot that has arrived back to a state: without running code, and into tensors that are there."""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor its unpickler)

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import _weights_only_unpickler
from torch.distributed.tensor import DTensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from stager.integrations.torchft_parts.connection import signed
from stager.integrations.torchft_parts.snapshot import Header, check_received, storages_in
from stager.loading.one_memory import conflicts
from stager.loading.pickles.pickle_check import check_pickle
from stager.loading.reading.direct_read import overlapping
from stager.replication.parcel import as_bytes
from stager.workers.checkpoint.formats.safe_globals import allowed, reason_of
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.errors import ReplicationError, StateMismatchError, UnsafePickleError

_FILLABLE = (torch.Tensor, torch.nn.Parameter)


class Restoring:
    """Receives one snapshot: a :class:`~stager.replication.exchange.Receiver`.

    Args:
        key: with which the header is signed.
        step: that was asked for.
        allow_pickle, safe_globals: as of the transport.
    """

    def __init__(self, key: bytes, step: int, allow_pickle: bool, safe_globals: Sequence[str]) -> None:
        self._key = key
        self._step = step
        self._allow_pickle = allow_pickle
        self._safe_globals = safe_globals
        self._slabs: list[torch.UntypedStorage] = []

    def begin(self, header: bytes) -> Iterator[torch.Tensor]:
        """Iterate over the memory for each slab. Each is compared with its hash when the next one is asked for."""
        content = signed(self._key, header)
        if content is None:
            raise ReplicationError(f"the header of step {self._step} is refused: it arrived with another signature")
        self._header = Header.from_bytes(content)
        if self._header.step != self._step:
            raise ReplicationError(f"step {self._step} was asked for, and step {self._header.step} was sent")
        self._slabs = [torch.UntypedStorage(nbytes, device="cpu") for nbytes in self._header.slab_bytes]
        for number, slab in enumerate(self._slabs):
            memory = as_bytes(slab)
            yield memory
            check_received(self._header, number, memory)

    def finish(self) -> Any:
        """Return the state, over the slabs. All of them are whole.

        Raises:
            UnsafePickleError: it holds an object that could run code.
        """
        storages = storages_in(self._header, self._slabs)
        structure = self._header.structure
        with torch_defaults():
            if self._allow_pickle:
                return _AnyUnpickler(io.BytesIO(structure), storages).load()
            return _load_plain(structure, storages, self._safe_globals)

    def forget(self) -> None:
        """Let go of the slabs: a state that was returned keeps those that it needs."""
        self._slabs = []


class _AnyUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: list[torch.UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, pid: Any) -> Any:
        return _storage(pid, self._storages)


def _storage(pid: Any, storages: list[torch.UntypedStorage]) -> Any:
    _, kind, number, _, _ = pid
    dtype = torch.uint8 if kind is torch.storage.UntypedStorage else kind.dtype
    return torch.storage.TypedStorage(wrap_storage=storages[int(number)], dtype=dtype, _internal=True)


def _load_plain(structure: bytes, storages: list[torch.UntypedStorage], safe_globals: Sequence[str]) -> Any:
    permission = (
        "If you trust the senders, make the transport with allow_pickle=True, or allow the class by "
        "safe_globals=['package.module.Class']"
    )
    try:
        check_pickle(structure, {str(number): storage.nbytes() for number, storage in enumerate(storages)})
        with allowed(safe_globals):
            unpickler: Any = _weights_only_unpickler.Unpickler(io.BytesIO(structure), encoding="utf-8")
            unpickler.persistent_load = lambda pid: _storage(pid, storages)
            return unpickler.load()
    except ValueError as error:
        raise UnsafePickleError(f"the state that was received is refused: {error}. {permission}") from error
    except pickle.UnpicklingError as error:
        reason = reason_of(error, io.BytesIO(structure), safe_globals)
        raise UnsafePickleError(
            f"the state that was received holds a pickled object that could run code when loaded ({reason}). {permission}"
        ) from error


def fill(state: Any, target: Any) -> None:
    """Put the values of a received state into the tensors of a target, and let the state have these tensors' memory.

    Args:
        state: which was received.
        target: a nested container of tensors. What it has at the same key paths is filled; the rest stays.

    Raises:
        StateMismatchError: tensors of one key path differ in shape, dtype or kind; or tensors of the target share memory,
            and different values were received for them. Nothing was changed.
    """
    targets = {path: value for path, value in tree_flatten_with_path(target)[0] if isinstance(value, torch.Tensor)}
    fills: list[_Fill] = []
    for path, received in tree_flatten_with_path(state)[0]:
        if not isinstance(received, torch.Tensor) or path not in targets:
            continue
        one = targets[path]
        if problem := _difference(received, one):
            raise _refusal(f"{keystr(path)} {problem}")
        fills.append(_Fill(keystr(path), received, _local(received), _alias(_local(one))))
    _refuse_conflicts(fills)
    with torch.no_grad():
        for filled in fills:
            _copy(filled.value, filled.memory)
            if isinstance(filled.received, DTensor):
                filled.received._local_tensor = filled.memory
            else:
                filled.received.data = filled.memory


@dataclass(frozen=True, slots=True)
class _Fill:
    """A tensor of the target that is filled.

    Attributes:
        path: its key path.
        received: gets the memory.
        value: of a received DTensor its local tensor, else the received tensor.
        memory: of the target.
    """

    path: str
    received: torch.Tensor
    value: torch.Tensor
    memory: torch.Tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _refusal(problem: str) -> StateMismatchError:
    return StateMismatchError(
        f"state_dict(){problem}; nothing was changed. Let state_dict= return what the sender's state_dict functions return, "
        "or leave it out"
    )


def _refuse_conflicts(fills: Sequence[_Fill]) -> None:
    """Raise unless each value stays where it was put, when all are filled: tied weights have the same value."""
    fills = list({(_view_of(one.memory), _view_of(one.value)): one for one in fills}.values())  # of tied weights one
    targets = [one.memory for one in fills]
    shared = overlapping(range(len(targets)), targets)
    numbers = [k for k, target in enumerate(targets) if k in shared or torch._debug_has_internal_overlap(target)]
    for one, other in conflicts(numbers, targets, lambda number: fills[number].value):
        if one == other:
            raise _refusal(
                f"{fills[one].path} has elements that share memory, and different values were received for them"
            )
        raise _refusal(
            f"{fills[one].path} and {fills[other].path} share memory, and different values were received for them"
        )


def _view_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*place, tensor.is_conj(), tensor.is_neg())


def _copy(received: torch.Tensor, memory: torch.Tensor) -> None:
    plain = not (received.is_conj() or received.is_neg())
    if plain and memory.is_cpu and received.is_contiguous() and memory.is_contiguous():
        # Tensor.copy_() waits for threads of OpenMP: three times as long on a busy host.
        ctypes.memmove(memory.data_ptr(), received.data_ptr(), received.nbytes)
    else:
        memory.copy_(received)


def _difference(received: torch.Tensor, target: torch.Tensor) -> str | None:
    """Say why a received tensor cannot go into the memory of a target; None if it can."""
    if isinstance(received, DTensor) != isinstance(target, DTensor):
        return f"is a {type(target).__name__}, and a {type(received).__name__} was received"
    if isinstance(received, DTensor) and isinstance(target, DTensor):
        if received.placements != target.placements:
            return f"is placed as {target.placements}, and one placed as {received.placements} was received"
        received, target = received._local_tensor, target._local_tensor
    for one in (received, target):
        if type(one) not in _FILLABLE or one.layout is not torch.strided:
            return (
                f"is a {type(one).__name__} of layout {one.layout}, and only plain tensors, parameters and DTensors of "
                "these can be filled"
            )
    if received.shape != target.shape or received.dtype != target.dtype:
        return (
            f"is {target.dtype} of shape {tuple(target.shape)}, and {received.dtype} of shape {tuple(received.shape)} was "
            "received"
        )
    return _obstacle(target)


def _obstacle(target: torch.Tensor) -> str | None:
    """Say why the memory of a target cannot be filled, whatever was received; None if it can."""
    if target.is_meta:
        return "is on the meta device, which has no memory to fill"
    if torch._debug_has_internal_overlap(target) == 1:
        return "is expanded, so several of its elements share memory"
    return None


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as another tensor, with a version of its own.

    The replica that recovers computes while it receives; autograd would refuse its backward pass if the versions of its
    parameters rose meanwhile. Its gradients do not count: torchft zeroes them.
    """
    with torch.no_grad():
        alias: Any = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        same: torch.Tensor = alias.set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        return same
