"""Getting the state to plan for: from a checkpoint, a callable, or numbers."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from stager.planning.optimizers import OptimizerKind, new_state
from stager.state.optimizer_states import state_after_first_step
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.structure import Chunks, fqn, leaves
from stager.workers.checkpoint.layout.tensor_node import without_flags
from stager.workers.errors import CorruptCheckpointError, UsageError

_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True)
class StateSource:
    """The state to plan for.

    Attributes:
        name: for messages.
        state: as for ``save()``; tensors may be on the meta device.
        assumed: what was assumed, because it is not known.
    """

    name: str
    state: Mapping[str, Any]
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class PickledObject:
    """Stands for an object of which only the size is known."""

    nbytes: int


def from_checkpoint(path: str) -> StateSource:
    """Get the state of a committed checkpoint from its manifest; no data is read.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError
    """
    layout = read_manifest(path).layout
    values = [_value(path, item) for item in layout.items]
    try:
        return StateSource(path, build(without_flags(layout.structure), values.__getitem__))
    except UsageError:  # tensors in chunks, by several ranks; or a class of which there is only the size
        state = {f"{index} {fqn(at)}": values[index] for at, index in read_manifest(path).paths()}
        if not any(isinstance(leaf, Chunks) for _, leaf in leaves(layout.structure)):
            return StateSource(path, state)
        return StateSource(path, state, ("one rank saves all that the ranks of this checkpoint saved together",))


def _value(path: str, item: Item) -> torch.Tensor | PickledObject:
    if item.kind != "tensor":
        return PickledObject(item.data_nbytes)
    try:
        return torch.empty_strided(item.shape, item.stride, dtype=dtype_of(item.dtype), device="meta")
    except (ValueError, RuntimeError) as error:
        raise CorruptCheckpointError(path, f"the manifest describes an impossible tensor: {error}") from error


def from_numbers(num_params: int, dtype: str, optimizer: OptimizerKind, num_tensors: int) -> StateSource:
    """Make a state of ``num_params`` parameters in tensors of equal size.

    Raises:
        UsageError: there is no such dtype.
    """
    try:
        kind = dtype_of(_DTYPE_NAMES.get(dtype, dtype))
    except ValueError as error:
        raise UsageError(
            f"--dtype {dtype}: torch has no such dtype; for example float32, bf16 or float8_e4m3fn"
        ) from error
    num_tensors = min(num_tensors, num_params)
    each, more = divmod(num_params, num_tensors)
    sizes = [each + (number < more) for number in range(num_tensors)]
    floats = kind.is_floating_point or kind.is_complex
    params = [torch.empty(size, dtype=kind, device="meta", requires_grad=floats) for size in sizes]
    state: dict[str, Any] = {"model": {f"parameter_{i}": param for i, param in enumerate(params)}}
    assumed = [f"the parameters are {num_tensors} tensors of equal size"]
    if optimizer is not OptimizerKind.NONE:
        state["optimizer"], note = new_state(optimizer, params)
        assumed.append(note)
    return StateSource(f"{num_params:,} parameters of {str(kind).removeprefix('torch.')}", state, tuple(assumed))


def from_callable(
    name: str, on_meta: bool, optimizer: OptimizerKind | None, *, option: str = "--module"
) -> StateSource:
    """Call ``package.module:callable``, which returns a state, a module, or a module and its optimizer.

    What it prints goes to stderr.

    Args:
        on_meta: call it with ``torch.device("meta")`` as the default device.
        optimizer: assumed if the callable returns only a module.
        option: the option that ``name`` comes from, for messages.

    Raises:
        UsageError: it cannot be imported, it raises, or it returns something else.
    """
    given = f"{option} {name}"
    made = _call(given, _find(name, given), on_meta)
    if isinstance(made, Module):
        state: dict[str, Any] = {"model": made}
    elif isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Module) and isinstance(made[1], Optimizer):
        state = {"model": made[0], "optimizer": made[1]}
    elif isinstance(made, Mapping):
        state = dict(made)
    else:
        raise UsageError(
            f"{given} returned a {type(made).__name__}; it must return a state (a mapping, as for save()), "
            "an nn.Module, or a tuple of an nn.Module and its optimizer"
        )
    assumed = _complete(name, state, optimizer)
    if on_meta:
        assumed.append("built on the meta device: nothing in the state depends on values")
    return StateSource(name, state, tuple(assumed))


def _complete(name: str, state: dict[str, Any], optimizer: OptimizerKind | None) -> list[str]:
    """Add the state that optimizers will have, and return what is assumed."""
    optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
    modules = [value for value in state.values() if isinstance(value, Module)]
    if optimizer not in (None, OptimizerKind.NONE) and (optimizers or not modules):
        what = "an optimizer already" if optimizers else "no nn.Module whose parameters could be optimized"
        raise UsageError(f"--optimizer {optimizer.value} cannot be used, because {name} returned {what}; leave it out")
    assumed = []
    for key, value in optimizers.items():
        kind = type(value).__name__
        if value.state:
            continue
        after = state_after_first_step(value)
        if after is None:
            assumed.append(
                f"{key} ({kind}) has no state before its first step, and is counted without it; take one step first"
            )
        else:
            state[key] = after
            assumed.append(f"{key} ({kind}) is counted with the state that it will have after its first step")
    if optimizers or not modules:
        return assumed
    if optimizer is None:
        return ["no optimizer is counted; --optimizer adds one"]
    if optimizer is not OptimizerKind.NONE:
        key = "optimizer" if "optimizer" not in state else "stager plan: optimizer"
        state[key], note = new_state(optimizer, (p for module in modules for p in module.parameters()))
        assumed.append(note)
    return assumed


def _find(name: str, given: str) -> Callable[[], Any]:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"{given}: it must have the form package.module:callable")
    directory = os.getcwd()
    if directory not in sys.path:  # as `python -m` does
        sys.path.insert(0, directory)
    found: Any = _guarded(f"{given}: cannot import {module_name}", lambda: importlib.import_module(module_name))
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{given}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(
            f"{given}: {attribute} has the type {type(found).__name__} and cannot be called; name a function"
        )
    function: Callable[..., Any] = found
    return function


def _call(given: str, function: Callable[[], Any], on_meta: bool) -> Any:
    def call() -> Any:
        if not on_meta:
            return function()
        with torch.device("meta"):
            return function()

    return _guarded(f"{given}: it raised", call)


def _guarded(what: str, call: Callable[[], Any]) -> Any:
    """Run code of the user, with its output on stderr, so that it does not mix with the result on stdout."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return call()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = (__file__, importlib.__file__)
        theirs = [frame for frame in frames if frame.filename[0] != "<" and frame.filename not in ours]
        where = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
        raise UsageError(f"{what}: {type(error).__name__}: {error}{where}") from error
