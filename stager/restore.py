"""From a committed checkpoint back to a state: new containers, or in place into what is there.

match   walk the structure and the target together; every mismatch is found before anything is changed
read    tensors straight into their targets, in parallel, each hash checked; objects unpickled under weights_only
apply   load_state_dict() of objects that have it, values put into containers
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stager.flatten import is_stateful
from workers.blob_reader import BlobReader, Wanted
from workers.errors import CorruptCheckpointError, StateMismatchError, UnsafePickleError
from workers.formats.dcp import dtype_of
from workers.layout import Item
from workers.manifest import Manifest
from workers.slab import bytes_at
from workers.structure import Node, Path, build, describe, walk

_SHOWN_PROBLEMS = 20


@dataclass(slots=True)
class _Match:
    """What matching found out.

    Attributes:
        targets: for each item, the tensors it is read into; the first gets the bytes, the others a copy.
        wanted: items that are needed at all.
        steps: what to do once everything is read, in order.
        missing, unexpected, problems: for the error.
    """

    targets: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    steps: list[Callable[[], None]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Restorer:
    """Restores from one checkpoint.

    Args:
        path, manifest: the checkpoint.
        num_threads: how many reads run at a time.
        allow_pickle: unpickle any object (runs code from the checkpoint).
    """

    def __init__(self, path: str, manifest: Manifest, num_threads: int, allow_pickle: bool) -> None:
        self._path = path
        self._manifest = manifest
        self._num_threads = num_threads
        self._allow_pickle = allow_pickle
        self._values: dict[int, Any] = {}

    def load(self) -> Any:
        """The whole state, in new memory.

        Raises:
            CorruptCheckpointError, StorageError, UnsafePickleError
        """
        wanted = set(range(len(self._manifest.layout.items)))
        self._read(wanted, {})
        return build(self._manifest.layout.structure, self._values.__getitem__)

    def load_into(self, target: MutableMapping[str, Any], strict: bool) -> None:
        """Restore the values that ``target`` names, in place.

        Tensors keep their identity and memory. Other values in containers are replaced. What is in the checkpoint under
        top-level names that ``target`` does not have is left alone.

        Raises:
            StateMismatchError: keys, shapes or dtypes differ; nothing was changed.
            CorruptCheckpointError, StorageError, UnsafePickleError
        """
        match = _Match()
        structure = self._manifest.layout.structure
        nodes = dict(zip(structure[1], structure[2], strict=True))
        for name in target:
            if name in nodes:
                self._match_entry(match, nodes[name], target, name, (name,), strict)
            elif strict:
                match.missing.append(describe((name,)))
        self._raise_problems(match, strict)
        self._read(match.wanted, match.targets)
        for step in match.steps:
            step()

    # -- match --------------------------------------------------------------------------------------------------

    def _match_entry(self, match: _Match, node: Node, container: Any, key: Any, path: Path, strict: bool) -> None:
        """Match ``container[key]`` with a node, and plan what becomes of it."""
        value = container[key]
        if is_stateful(value):
            self._match_stateful(match, node, value, path, strict)
        elif isinstance(value, torch.Tensor):
            self._match_tensor(match, node, value, path)
        elif isinstance(value, Mapping) and type(node) is not int and node[0] != "list":
            self._match_mapping(match, node, value, path, strict)
        elif isinstance(value, list) and type(node) is not int and node[0] == "list":
            self._match_list(match, node, value, path, strict)
        else:
            self._want_all(match, node)
            if isinstance(container, (MutableMapping, list)):
                match.steps.append(lambda: container.__setitem__(key, build(node, self._values.__getitem__)))
            else:
                match.problems.append(f"{describe(path)}: its container {type(container).__name__} cannot be changed")

    def _match_mapping(self, match: _Match, node: Node, value: Mapping[Any, Any], path: Path, strict: bool) -> None:
        nodes = dict(zip(node[1], node[2], strict=True))
        for key in value:
            if key in nodes:
                self._match_entry(match, nodes[key], value, key, (*path, key), strict)
            else:
                match.missing.append(describe((*path, key)))
        for key in nodes.keys() - value.keys():
            if strict or not isinstance(value, MutableMapping):
                match.unexpected.append(describe((*path, key)))
            else:
                self._want_all(match, nodes[key])
                match.steps.append(lambda k=key: value.__setitem__(k, build(nodes[k], self._values.__getitem__)))  # type: ignore[misc]

    def _match_list(self, match: _Match, node: Node, value: list[Any], path: Path, strict: bool) -> None:
        if len(value) != len(node[1]):
            match.problems.append(f"{describe(path)}: has {len(value)} entries, the checkpoint {len(node[1])}")
            return
        for index, child in enumerate(node[1]):
            self._match_entry(match, child, value, index, (*path, index), strict)

    def _match_tensor(self, match: _Match, node: Node, value: torch.Tensor, path: Path) -> None:
        if type(node) is not int:
            match.problems.append(f"{describe(path)}: is a tensor here and a container in the checkpoint")
            return
        item = self._manifest.layout.items[node]
        match.wanted.add(node)
        if item.kind == "object":  # a sparse or quantized tensor, perhaps
            match.steps.append(lambda: self._copy_object(node, value, path))
        elif (problem := _difference(item, value)) is not None:
            match.problems.append(f"{describe(path)}: {problem}")
        else:
            match.targets.setdefault(node, []).append(value)

    def _copy_object(self, index: int, value: torch.Tensor, path: Path) -> None:
        loaded = self._values[index]
        if not isinstance(loaded, torch.Tensor):
            raise StateMismatchError(f"{describe(path)}: is a tensor here and a {type(loaded).__name__} there")
        with torch.no_grad():
            value.copy_(loaded)

    def _match_stateful(self, match: _Match, node: Node, value: Any, path: Path, strict: bool) -> None:
        """Tensors that are there and fit are read in place; the object then takes the rest by load_state_dict()."""
        existing: dict[Path, torch.Tensor] = {}
        template = value.state_dict()
        _collect_tensors(template, path, existing)
        leaves = dict(_leaves(node, path))
        if isinstance(value, torch.nn.Module):
            self._check_module(match, leaves, template, path)
        elif isinstance(value, torch.optim.Optimizer):
            self._check_optimizer(match, node, value, path)
        for leaf, index in leaves.items():
            item = self._manifest.layout.items[index]
            target = existing.get(leaf)
            if target is not None and item.kind == "tensor" and _difference(item, target) is None:
                match.targets.setdefault(index, []).append(target)
        self._want_all(match, node)
        module_not_strict = isinstance(value, torch.nn.Module) and not strict

        def apply() -> None:
            # The tensors read in place are given back as themselves: copying them onto themselves costs nothing.
            by_index = self._values
            state = build(node, by_index.__getitem__)
            value.load_state_dict(state, strict=False) if module_not_strict else value.load_state_dict(state)

        match.steps.append(apply)

    def _check_module(self, match: _Match, leaves: dict[Path, int], template: Mapping[str, Any], path: Path) -> None:
        """What ``nn.Module.load_state_dict`` would complain about, before anything is overwritten."""
        here = {(*path, key): tensor for key, tensor in template.items()}
        match.missing += [describe(leaf) for leaf in here if leaf not in leaves]
        match.unexpected += [describe(leaf) for leaf in leaves if leaf not in here]
        for leaf, index in leaves.items():
            item, tensor = self._manifest.layout.items[index], here.get(leaf)
            if isinstance(tensor, torch.Tensor) and item.kind == "tensor" and item.shape != tuple(tensor.shape):
                match.problems.append(f"{describe(leaf)}: {_shape_problem(item, tensor)}")

    def _check_optimizer(self, match: _Match, node: Node, value: torch.optim.Optimizer, path: Path) -> None:
        """Another number of parameter groups is refused by the optimizer, but only after its state is overwritten."""
        groups = dict(zip(node[1], node[2], strict=True)).get("param_groups") if type(node) is not int else None
        if isinstance(groups, list) and groups[0] == "list" and len(groups[1]) != len(value.param_groups):
            match.problems.append(
                f"{describe(path)}: has {len(value.param_groups)} parameter groups, the checkpoint {len(groups[1])}"
            )

    def _want_all(self, match: _Match, node: Node) -> None:
        match.wanted.update(index for _, index in _leaves(node, ()))

    def _raise_problems(self, match: _Match, strict: bool) -> None:
        lines = list(match.problems)
        if strict:
            lines += [f"{name}: missing in the checkpoint" for name in match.missing]
            lines += [f"{name}: in the checkpoint, but not here" for name in match.unexpected]
        if lines:
            shown = "\n  ".join(lines[:_SHOWN_PROBLEMS])
            more = f"\n  ... and {len(lines) - _SHOWN_PROBLEMS} more" if len(lines) > _SHOWN_PROBLEMS else ""
            advice = "" if match.problems else "\nload(..., strict=False) loads what fits"
            raise StateMismatchError(f"{self._path} does not fit; nothing was changed:\n  {shown}{more}{advice}")

    # -- read ---------------------------------------------------------------------------------------------------

    def _read(self, wanted: set[int], targets: dict[int, list[torch.Tensor]]) -> None:
        """Fill ``self._values``: the target tensors themselves where there are any, new ones elsewhere."""
        items = self._manifest.layout.items
        blobs: dict[int, bytearray] = {}
        direct: list[Wanted] = []
        staged: list[tuple[int, torch.Tensor]] = []
        for index in sorted(wanted):
            item = items[index]
            if item.kind == "object":
                blobs[index] = bytearray(item.nbytes)
                direct.append(Wanted(index, memoryview(blobs[index])))
                continue
            memory = next((t for t in targets.get(index, ()) if _takes_bytes(item, t)), None)
            if memory is None:
                memory = torch.empty_strided(item.shape, item.stride, dtype=dtype_of(item.dtype))
                staged.append((index, memory))
            self._values[index] = targets[index][0] if targets.get(index) else memory
            direct.append(Wanted(index, bytes_at(memory.data_ptr(), item.data_nbytes)))
            for target in targets.get(index, ()):
                if target.data_ptr() != memory.data_ptr():
                    staged.append((index, memory))
        objects_first = [w for w in direct if items[w.index].kind == "object"]
        with BlobReader(self._path, self._manifest, self._num_threads) as reader:
            reader.read(objects_first)
            for index, blob in blobs.items():  # what must not be unpickled is refused before a tensor is touched
                self._values[index] = self._unpickle(index, bytes(blob))
            reader.read([w for w in direct if items[w.index].kind == "tensor"])
        self._copy_on(dict(staged), targets)

    def _copy_on(self, staged: dict[int, torch.Tensor], targets: dict[int, list[torch.Tensor]]) -> None:
        """Bytes that could not be read straight into their targets, and further targets of one item."""
        with torch.no_grad():
            for index, tensors in targets.items():
                source = staged.get(index)
                for tensor in tensors:
                    if source is not None and tensor.data_ptr() != source.data_ptr():
                        tensor.copy_(source)
                    else:
                        torch.autograd.graph.increment_version(tensor)  # it was written behind autograd's back

    def _unpickle(self, index: int, blob: bytes) -> Any:
        try:
            return torch.load(io.BytesIO(blob), weights_only=not self._allow_pickle, map_location=None)
        except pickle.UnpicklingError as error:
            name = self._name(index)
            if self._allow_pickle:
                raise CorruptCheckpointError(self._path, f"{name} cannot be unpickled: {error}") from error
            reason = str(error).splitlines()[0]
            raise UnsafePickleError(
                f"{name} in {self._path} is a pickled object that could run code when loaded ({reason}); nothing was "
                "changed. If you trust where this checkpoint comes from: load(..., allow_pickle=True), or "
                "torch.serialization.add_safe_globals([...]) for its class"
            ) from error

    def _name(self, index: int) -> str:
        return next(describe(path) for path, leaf in self._manifest.paths() if leaf == index)


def _leaves(node: Node, path: Path) -> list[tuple[Path, int]]:
    return list(walk(node, path))


def _collect_tensors(value: Any, path: Path, found: dict[Path, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            _collect_tensors(child, (*path, key), found)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _collect_tensors(child, (*path, index), found)


def _difference(item: Item, tensor: torch.Tensor) -> str | None:
    """Why an item cannot be read into a tensor; None when it can."""
    if item.shape != tuple(tensor.shape):
        return _shape_problem(item, tensor)
    if dtype_of(item.dtype) != tensor.dtype:
        return f"is {str(tensor.dtype).removeprefix('torch.')} here and {item.dtype} in the checkpoint"
    return None


def _shape_problem(item: Item, tensor: torch.Tensor) -> str:
    return f"has shape {list(tensor.shape)} here and {list(item.shape)} in the checkpoint"


def _takes_bytes(item: Item, tensor: torch.Tensor) -> bool:
    """Whether the raw bytes can go straight into the tensor's memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
        and (tensor.stride() == item.stride or tensor.numel() == 0)
    )
