"""Guarded overlap: tensors that only an optimizer's ``step()`` changes may be copied while training goes on.

NOTE [ Overlap is safe by construction ]
``save()`` may return before a tensor is copied only if nothing changes the tensor before the copy is done.
  1. By calling ``guard(optimizer)``, the user promises that only ``optimizer.step()`` writes to its parameters and state.
  2. Before each step, a pre-hook waits for every snapshot that is still being taken. If the step was given a closure, the
     forward and backward pass are in it (Lightning does so). Torch's own optimizers call it before they write to anything,
     so there the wait comes when the closure returns. Others may write first (SAM does), so they wait at once.
  3. All other tensors (buffers that a forward pass changes, counters, averaged weights) are copied before ``save()``
     returns.
  4. A step that is captured in a graph runs its hooks once, and its replays run none. So an optimizer whose step is
     captured is not guarded any more.
  5. Programs break the promise of 1, and do not know it. ``tripwires.py`` finds out.
"""

from __future__ import annotations

import bisect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import and_, attrgetter, is_
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stager.config.arguments import shown
from stager.snapshot.picker import Picker, picker
from stager.state.optimizer_states import expected_nbytes
from stager.state.shards import is_sharded, memory_of
from stager.state.snapshot_plan import SnapshotPlan
from stager.state.tensor_kinds import PLAIN_TENSORS
from stager.workers.checkpoint.layout.layout import is_dense
from stager.workers.device.accelerator import is_capturing
from stager.workers.errors import ArgumentError

logger = logging.getLogger("stager")

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
_Tensor: Any = torch.Tensor  # its methods are called unbound, which the stubs do not know
_layout, _is_on_host, _nbytes = map(attrgetter, ("layout", "is_cpu", "nbytes"))


class Guard:
    """The guarded optimizers of one Checkpointer. They are held weakly.

    Args:
        wait: called before each step of a guarded optimizer; returns when no snapshot is being taken.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hooks: list[RemovableHandle] = []
        self._last: _Protected | None = None

    def add(self, *optimizers: Optimizer) -> None:
        """Guard optimizers. Guarding one again changes nothing.

        Raises:
            ArgumentError: not a torch optimizer; none is guarded then.
        """
        for one in [hooked for optimizer in optimizers for hooked in _with_hooks(optimizer)]:
            if one not in self._optimizers:
                self._optimizers.add(one)
                self._hooks.append(one.register_step_pre_hook(self._before_step))

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not is_capturing():
            if (later := _waiting_in_closure(optimizer, args, kwargs or {}, self._wait)) is not None:
                return later
            self._wait()
        elif optimizer in self._optimizers:
            self._optimizers.discard(optimizer)
            logger.warning(
                "a step of a guarded %s is being captured in a graph: replays of the graph run no hooks, so nothing would "
                "wait for a snapshot. Its tensors are copied before save() returns from now on",
                type(optimizer).__name__,
            )
        return None

    # torch.compile(optimizer.step) calls it as it is: compiled, it would be a constant that it had nothing to wait for.
    _before_step._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable() sets

    def tensors(self) -> list[torch.Tensor]:
        """List the parameters and states of the guarded optimizers, as the optimizers hold them (DTensors, say)."""
        return [tensor for optimizer in self._optimizers for tensor in _tensors_of(optimizer)]

    def expected_nbytes(self, num_ranks: int) -> int | None:
        """Guess how many bytes of the guarded optimizers this rank will save; None if nothing tells.

        Args:
            num_ranks: ranks that save together.
        """
        return expected_nbytes(self._optimizers, num_ranks) if self else None

    def protects(self, plan: SnapshotPlan, leaves: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Protection:
        """Tell which leaves' memory only a guarded step changes.

        Args:
            leaves: of the state, which the plan was made or checked for in this save.
            tensors: what :meth:`tensors` lists now.
        """
        last = self._last
        if last is None or not last.matching.holds(plan, leaves, tensors):
            last = None
        matching = _Matching.of(plan, leaves, tensors) if last is None else last.matching
        others = matching.others_of(tensors)
        reach = _reach(others)
        if last is None or last.reach != reach:
            last = self._last = _Protected(matching, reach, _protected(plan, matching.is_own, reach))
        return Protection(last.protected, matching.is_own, others)

    def close(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._optimizers.clear()
        self._last = None

    def __bool__(self) -> bool:
        return bool(self._hooks) and len(self._optimizers) > 0


@dataclass(frozen=True, slots=True)
class Protection:
    """What is guarded of a state. Lists of leaves are in the order of ``plan.leaves``.

    Attributes:
        protected: whether only a guarded step changes the leaf's memory.
        is_own: whether the leaf is a tensor of an optimizer, and not another one over the same memory.
        others: the optimizers' tensors that are no leaves.
    """

    protected: list[bool]
    is_own: list[bool]
    others: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Matching:
    """Which leaves are the very tensors of an optimizer, as all are that its ``state_dict()`` returns.

    What the plan knows of those was read a moment ago, and need not be read again.

    Attributes:
        num_tensors: of the optimizers.
        is_own: see :class:`Protection`.
        own_leaves, own_tensors: pick these tensors, of the leaves and of the optimizers' tensors.
        others_of: picks the optimizers' other tensors.
    """

    plan: SnapshotPlan
    num_tensors: int
    is_own: list[bool]
    own_leaves: Picker
    own_tensors: Picker
    others_of: Picker

    @staticmethod
    def of(plan: SnapshotPlan, leaves: Sequence[Any], tensors: Sequence[torch.Tensor]) -> _Matching:
        """Match the leaves and the tensors of the optimizers."""
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        found = [numbers.get(id(leaves[leaf])) for leaf in plan.leaves]
        own = [(leaf, number) for leaf, number in zip(plan.leaves, found, strict=True) if number is not None]
        known = {number for _, number in own}
        return _Matching(
            plan,
            len(tensors),
            [number is not None for number in found],
            picker([leaf for leaf, _ in own]),
            picker([number for _, number in own]),
            picker([number for number in range(len(tensors)) if number not in known]),
        )

    def holds(self, plan: SnapshotPlan, leaves: Sequence[Any], tensors: Sequence[torch.Tensor]) -> bool:
        """Tell whether the same leaves are the same tensors as then. A leaf that became one since may be missed."""
        return (
            plan is self.plan
            and len(tensors) == self.num_tensors
            and all(map(is_, self.own_leaves(leaves), self.own_tensors(tensors)))
        )


@dataclass(frozen=True, slots=True)
class _Protected:
    """Which leaves are protected, and what that depends on."""

    matching: _Matching
    reach: dict[torch.device, dict[int, int]]
    protected: list[bool]


def _protected(plan: SnapshotPlan, is_own: Sequence[bool], others: dict[torch.device, dict[int, int]]) -> list[bool]:
    """Tell for each tensor of a plan whether its memory is that of an optimizer's tensors.

    Args:
        is_own: see :class:`Protection`.
        others: the memory of the tensors that are no leaves.
    """
    places = list(zip(plan.devices or (_HOST,) * len(plan.leaves), plan.addresses, plan.spans, strict=True))
    reach = {device: dict(reached) for device, reached in others.items()}
    for device, address, nbytes in compress(places, map(and_, is_own, plan.dense)):
        reached = reach.setdefault(device, {})
        reached[address] = max(nbytes, reached.get(address, 0))
    protected = [reach.get(device, {}).get(address, -1) >= nbytes for device, address, nbytes in places]
    if plan.has_slices:
        inside = {device: _Ranges(reached) for device, reached in reach.items()}
        for i, (device, address, nbytes) in enumerate(places):
            if not protected[i] and device in inside:
                protected[i] = inside[device].cover(address, nbytes)
    return protected


def _reach(guarded: Sequence[torch.Tensor]) -> dict[torch.device, dict[int, int]]:
    """Map device and address to the number of bytes from there that only a guarded step changes.

    Tensors with gaps between their elements, or with elements that share memory, are left out: the bytes from their first
    one on are not all theirs.
    """
    tensors = list(guarded)
    if not PLAIN_TENSORS.issuperset(map(type, tensors)):
        tensors = [memory for tensor in tensors for memory in here(tensor)]
    if set(map(_layout, tensors)) - {torch.strided}:
        tensors = [tensor for tensor in tensors if tensor.layout is torch.strided]
    if not all(map(_Tensor.is_contiguous, tensors)):
        tensors = [tensor for tensor in tensors if is_dense(tuple(tensor.shape), tensor.stride())]
    addresses = map(_Tensor.data_ptr, tensors)
    if all(map(_is_on_host, tensors)):
        return {_HOST: dict(zip(addresses, map(_nbytes, tensors), strict=True))}
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
        ArgumentError: there is none.
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
        raise ArgumentError(
            f"guard() takes torch optimizers, as in guard(optimizer) or guard(first, second), and got {shown(optimizer)}; "
            "give the optimizer that changes the parameters"
        )
    return hooked


def _waiting_in_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], wait: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Move the wait behind the closure of a step, see 2. of the NOTE.

    Args:
        args, kwargs: of ``step()``, with the optimizer itself first, as torch gives them to a pre-hook.

    Returns:
        The arguments to step with; None: there is no closure, or the optimizer may write before it calls it.
    """
    closure = kwargs.get("closure") if len(args) < 2 else args[1]
    if closure is None or not type(optimizer).step.__module__.startswith("torch.optim."):
        return None

    def closure_then_wait() -> Any:
        result = closure()
        wait()
        return result

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_then_wait}
    return (args[0], closure_then_wait, *args[2:]), kwargs


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
