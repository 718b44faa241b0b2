"""Guarded overlap: tensors that only an optimizer's ``step()`` changes may be copied while training goes on.

NOTE [ Overlap is safe by construction ]
``save()`` may return before a tensor is copied only if nothing changes the tensor before the copy is done.
  1. By calling ``guard(optimizer)``, the user promises that only ``optimizer.step()`` writes to its parameters and state.
  2. Before each step, a pre-hook waits for every snapshot that is still being taken.
  3. All other tensors (buffers that a forward pass changes, counters, averaged weights) are copied before ``save()``
     returns.
  4. Programs break the promise of 1, and do not know it. ``tripwires.py`` finds out.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stager.state.shards import is_sharded, memory_of
from stager.state.snapshot_plan import SnapshotPlan
from stager.state.tensor_kinds import PLAIN_TENSORS
from stager.workers.checkpoint.layout.layout import is_dense

_HOST = torch.device("cpu")
_WRAPPED = (
    "optimizer",  # Accelerate, Apex, DeepSpeed, Lookahead, Megatron
    "_optimizer",  # Opacus, Lightning
    "base_optimizer",  # SAM
    "optim",
    "inner_optimizer",
    "chained_optimizers",  # Megatron
    "optimizers",
)
_Tensor: Any = torch.Tensor  # its methods and descriptors are called unbound, which the stubs do not know


class Guard:
    """The guarded optimizers of one Checkpointer. They are held weakly.

    Args:
        wait: called before each step of a guarded optimizer; returns when no snapshot is being taken.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hooks: list[RemovableHandle] = []

    def add(self, optimizer: Optimizer) -> None:
        """Guard one optimizer. Guarding it again changes nothing.

        Raises:
            TypeError: not a torch optimizer.
        """
        for one in _with_hooks(optimizer):
            if one not in self._optimizers:
                self._optimizers.add(one)
                self._hooks.append(one.register_step_pre_hook(self._before_step))

    def _before_step(self, *_: Any) -> None:
        self._wait()

    def tensors(self) -> list[torch.Tensor]:
        """List the parameters and states of the guarded optimizers, as the optimizers hold them (DTensors, say)."""
        return [tensor for optimizer in self._optimizers for tensor in _tensors_of(optimizer)]

    def protects(self, plan: SnapshotPlan, tensors: Sequence[torch.Tensor]) -> list[bool]:
        """Tell for each tensor, in the order of ``plan.leaves``, whether only a guarded step changes its memory.

        Args:
            tensors: what :meth:`tensors` lists now.
        """
        reach = _reach(tensors)
        if plan.devices is None:
            on_host = reach.get(_HOST, {})
            protected = [on_host.get(a, -1) >= n for a, n in zip(plan.addresses, plan.spans, strict=True)]
        else:
            protected = [
                reach.get(device, {}).get(address, -1) >= nbytes
                for device, address, nbytes in zip(plan.devices, plan.addresses, plan.spans, strict=True)
            ]
        if plan.has_slices:
            inside = {device: _Ranges(reached) for device, reached in reach.items()}
            devices = plan.devices or [_HOST] * len(plan.addresses)
            for i, (device, address, nbytes) in enumerate(zip(devices, plan.addresses, plan.spans, strict=True)):
                if not protected[i] and device in inside:
                    protected[i] = inside[device].cover(address, nbytes)
        return protected

    def close(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._optimizers.clear()

    def __bool__(self) -> bool:
        return bool(self._hooks) and len(self._optimizers) > 0


def _reach(guarded: Sequence[torch.Tensor]) -> dict[torch.device, dict[int, int]]:
    """Map device and address to the number of bytes from there that only a guarded step changes.

    Tensors with gaps between their elements, or with elements that share memory, are left out: the bytes from their first
    one on are not all theirs.
    """
    tensors = list(guarded)
    if not PLAIN_TENSORS.issuperset(map(type, tensors)):
        tensors = [memory for tensor in tensors for memory in here(tensor)]
    if not all(layout is torch.strided for layout in map(_Tensor.layout.__get__, tensors)):
        tensors = [tensor for tensor in tensors if tensor.layout is torch.strided]
    if not all(map(_Tensor.is_contiguous, tensors)):
        tensors = [tensor for tensor in tensors if is_dense(tuple(tensor.shape), tensor.stride())]
    addresses = map(_Tensor.data_ptr, tensors)
    if all(map(_Tensor.is_cpu.__get__, tensors)):
        return {_HOST: dict(zip(addresses, map(_Tensor.nbytes.__get__, tensors), strict=True))}
    reach: dict[torch.device, dict[int, int]] = {}
    for tensor, address in zip(tensors, addresses, strict=True):
        reach.setdefault(tensor.device, {})[address] = tensor.nbytes
    return reach


class _Ranges:
    """Stretches of memory that do not overlap."""

    def __init__(self, reached: dict[int, int]) -> None:
        self._starts = sorted(reached)
        self._reached = reached

    def cover(self, address: int, nbytes: int) -> bool:
        found = bisect.bisect_right(self._starts, address) - 1
        if found < 0:
            return False
        start = self._starts[found]
        return address + nbytes <= start + self._reached[start]


def _with_hooks(optimizer: Any) -> list[Optimizer]:
    """Find the optimizers whose ``step()`` changes the parameters: this one, and those that it wraps.

    Wrappers have the wrapped one as an attribute. Accelerate's calls it and does no more; it has no hooks of its own.
    Others (SAM, Lookahead) write to the parameters themselves, before or after the wrapped one does, and have hooks.

    Raises:
        TypeError: there is none.
    """
    found: dict[int, Any] = {}
    waiting = [optimizer]
    while waiting:
        one = waiting.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        inner = [getattr(one, "__dict__", {}).get(name) for name in _WRAPPED]
        for value in inner:
            several = value if isinstance(value, (list, tuple)) else [value]
            waiting += [part for part in several if isinstance(part, Optimizer) or _wraps(part)]
    hooked = [one for one in found.values() if isinstance(one, Optimizer) and "_optimizer_step_pre_hooks" in vars(one)]
    if not hooked:
        raise TypeError(
            f"guard() takes torch optimizers, not {type(optimizer).__name__}; give the optimizer that it works with"
        )
    return hooked


def _wraps(value: Any) -> bool:
    """Whether something that is no torch optimizer (Apex's and DeepSpeed's are not) may wrap one."""
    return hasattr(value, "step") and hasattr(value, "param_groups")


def _tensors_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def here(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the tensors that have this rank's memory of a tensor."""
    return memory_of(tensor) if is_sharded(tensor) else (tensor,)
