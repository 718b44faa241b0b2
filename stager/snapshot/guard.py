"""Guarded overlap: tensors that only an optimizer's ``step()`` changes may be copied while training goes on.

NOTE [ Overlap is safe by construction ]
``save()`` may return before a tensor is copied only if nothing changes the tensor before the copy is done.
  1. By calling ``guard(optimizer)``, the user promises that only ``optimizer.step()`` writes to its parameters and state.
  2. Before each step, a pre-hook waits for every snapshot that is still being taken.
  3. All other tensors (buffers that a forward pass changes, counters, averaged weights) are copied before ``save()``
     returns.
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

_HOST = torch.device("cpu")
_WRAPPED = ("optimizer", "_optimizer", "base_optimizer", "optim", "inner_optimizer")
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
        optimizer = _unwrapped(optimizer)
        if optimizer in self._optimizers:
            return
        self._optimizers.add(optimizer)
        wait = self._wait

        def wait_for_snapshots(*_: Any) -> None:
            wait()

        self._hooks.append(optimizer.register_step_pre_hook(wait_for_snapshots))

    def protects(self, plan: SnapshotPlan) -> list[bool]:
        """Tell for each tensor, in the order of ``plan.leaves``, whether only a guarded step changes its memory."""
        reach = self._reach()
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

    def _reach(self) -> dict[torch.device, dict[int, int]]:
        """Map device and address to the number of bytes from there that only a guarded step changes."""
        tensors = [tensor for optimizer in self._optimizers for tensor in _tensors_of(optimizer)]
        tensors = [tensor for tensor in tensors if tensor.layout is torch.strided]
        addresses = map(_Tensor.data_ptr, tensors)
        if all(map(_Tensor.is_cpu.__get__, tensors)):
            return {_HOST: dict(zip(addresses, map(_Tensor.nbytes.__get__, tensors), strict=True))}
        reach: dict[torch.device, dict[int, int]] = {}
        for tensor, address in zip(tensors, addresses, strict=True):
            reach.setdefault(tensor.device, {})[address] = tensor.nbytes
        return reach

    def close(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._optimizers.clear()

    def __bool__(self) -> bool:
        return bool(self._hooks) and len(self._optimizers) > 0


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


def _unwrapped(optimizer: Any) -> Optimizer:
    """Find the optimizer whose ``step()`` changes the parameters: wrappers (Accelerate's, Apex's) have it as an attribute.

    Raises:
        TypeError: there is none.
    """
    given, seen = optimizer, set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        inner = (vars(optimizer).get(name) for name in _WRAPPED) if hasattr(optimizer, "__dict__") else ()
        optimizer = next((one for one in inner if isinstance(one, Optimizer)), optimizer)
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"guard() takes torch optimizers, not {type(given).__name__}; give the optimizer that it works with"
        )
    return optimizer


def _tensors_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from _here(parameter)
    for state in optimizer.state.values():
        if isinstance(state, dict):
            for value in state.values():
                yield from _here(value) if isinstance(value, torch.Tensor) else ()


def _here(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tensors that have this rank's memory of a tensor."""
    return memory_of(tensor) if is_sharded(tensor) else (tensor,)
