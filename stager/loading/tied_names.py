"""Names of tied weights that a file does not have, because it stores each tensor once.

transformers and others write one name of weights that are tied, ``transformer.wte.weight`` of GPT-2, and leave
``lm_head.weight`` to the model, which ties it again. Where the target has tensors that share all of their memory, the
structure of the checkpoint gets the names that it lacks, beside the one that it has.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from stager.loading.nodes import is_plain_mapping, state_of
from stager.loading.renaming import Renaming
from stager.state.shards import memory_of, shape_of
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import Node


def with_tied_names(structure: Node, target: Any, renaming: Renaming) -> Node:
    """Return the structure of a checkpoint with the names that are tied to others in ``target``.

    Args:
        structure: has the names of the target.
        target: what is loaded into: a mapping, or one object with ``load_state_dict()``.
        renaming: gives names the prefix that only the target has.
    """
    if isinstance(target, Mapping):
        return _Completion(renaming).of(structure, target)
    if not is_stateful(target) or not is_plain_mapping(structure):
        return structure
    # One object takes the whole, or an entry of it. Which it is, ``sole_fit`` tells later.
    entries = [_Completion(renaming).of(child, target) for child in structure[2]]
    return _Completion(renaming).of([*structure[:2], entries, *structure[3:]], target)


class _Completion:
    """Adds names to the structure of one checkpoint."""

    def __init__(self, renaming: Renaming) -> None:
        self._renaming = renaming
        self._items: dict[Hashable, int] = {}  # of what memory the checkpoint has which item

    def of(self, structure: Node, target: Any) -> Node:
        """Return the structure with more names."""
        self._note(structure, target)
        return self._completed(structure, target) if self._items else structure

    def _note(self, node: Node, value: Any) -> None:
        state = _state(value)
        if state is None or not is_plain_mapping(node):
            return
        node = self._renaming.aligned(node, state)
        memories = _memories(value, state)
        for key, child in zip(node[1], node[2], strict=True):
            if type(child) is int and (memory := memories.get(key)) is not None:
                self._items.setdefault(memory, child)
            elif key in state:
                self._note(child, state[key])

    def _completed(self, node: Node, value: Any) -> Node:
        state = _state(value)
        if state is None or not is_plain_mapping(node):
            return node
        node = self._renaming.aligned(node, state)
        nodes = dict(zip(node[1], node[2], strict=True))
        nodes = {key: self._completed(child, state[key]) if key in state else child for key, child in nodes.items()}
        for key, memory in _memories(value, state).items():
            if key not in nodes and memory in self._items:
                nodes[key] = self._items[memory]
        return [node[0], list(nodes), list(nodes.values()), *node[3:]]


def _state(value: Any) -> Mapping[Any, Any] | None:
    """Return the names of a value of the target: those of a mapping, or of an object's state. None if it has none."""
    if isinstance(value, torch.optim.Optimizer):  # its tensors are not tied
        return None
    if is_stateful(value):
        value = state_of(value, ())
    return value if isinstance(value, Mapping) else None


def _memories(value: Any, state: Mapping[Any, Any]) -> dict[Any, Hashable]:
    """Return what tells the memory of each tensor of a state. Equal for two names: they are tied."""
    objects: dict[Any, int] = {}
    if isinstance(value, torch.nn.Module):
        for named in (value.named_parameters, value.named_buffers):
            objects.update((name, id(tensor)) for name, tensor in named(remove_duplicate=False))
    found: dict[Any, Hashable] = {}
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and not torch.nn.parameter.is_lazy(tensor):
            memory = _memory(tensor)
            if memory is None and key in objects:  # this rank has no element of it, and the others may have some
                memory = ("object", objects[key])
            if memory is not None:
                found[key] = memory
    return found


def _memory(tensor: torch.Tensor) -> Hashable | None:
    """Return where the elements of a tensor are; None if it has none here, or they cannot be told."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    places = []
    for part in memory_of(tensor):
        if not part.numel() or part.device.type == "meta":
            return None
        places.append((part.data_ptr(), str(part.device), tuple(part.shape), part.stride()))
    return (tensor.dtype, shape_of(tensor), *places)
