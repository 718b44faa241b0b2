"""Merging a loaded value into one of the target, so that the target's own containers and tensors become what was saved.

Some containers are one object in the checkpoint: a list of numbers, a tuple, in the format ``torch`` every mapping with a
class or keys of its own. The object is unpickled before anything is changed. Then a :class:`Merge` compares it with the
target and finds what will be done; :meth:`Merge.apply` does it. Nothing here recurses but tuples in tuples.

    tensor in both, same shape and dtype      the target's is filled
    object with ``load_state_dict()``         gets what was saved as its state
    container of the same type in both        the target's is emptied and filled, so that it keeps its identity
    tuple in both                             a new one, of merged elements; the target's own if these are the same
    anything else                             what was saved takes its place
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from stager.loading.belongings import holds_belongings, holds_state, is_owned_tensor, tensor_paths
from stager.loading.difference import object_difference
from stager.loading.nodes import in_one_order
from stager.state.stateful import is_stateful
from stager.workers.checkpoint.layout.structure import Path, describe
from stager.workers.errors import UnloadableError

_SCALARS = (bool, int, float, complex, str, bytes)
StandsFor = dict[int, tuple[Any, Any]]
"""By identity of a container of the target: the container, and the loaded value that it becomes."""

_MAPPINGS = frozenset((dict, OrderedDict, defaultdict, Counter))


class Merge:
    """What it takes to make a value of the target what was saved.

    Args:
        loaded: what was saved.
        target: the value of the target.
        path: of both, for messages.
        strict: a tensor of another shape or dtype is a problem; otherwise, the saved one takes its place.
        stands_for: what containers of the target became by other merges. One that is at several places of the target stays
            there if the values that were saved for them are equal; otherwise the later place gets what was saved.

    Attributes:
        result: what takes the target's place: often the target itself.
        problems: what does not fit.
        missing: what belongs to somebody, and was not saved. It stays.
        dropped: tensors that were not saved, and are no longer in their containers.
        replaced: tensors whose place a saved value takes.
    """

    def __init__(
        self, loaded: Any, target: Any, path: Path, *, strict: bool, stands_for: StandsFor | None = None
    ) -> None:
        self._strict = strict
        self.problems: list[str] = []
        self.missing: list[Path] = []
        self.dropped: list[Path] = []
        self.replaced: list[Path] = []
        self._todo: deque[tuple[Any, Any, Path]] = deque()
        self._placed: dict[int, Any] = {}  # by identity of the loaded container: what stands for it
        self._taken: set[int] = set()  # identities of the target's containers that stand for a loaded one
        self._stands_for = {} if stands_for is None else stands_for
        self._fills: list[tuple[Any, Any]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._filled: dict[int, tuple[torch.Tensor, Path]] = {}  # by identity of a tensor of the target: its value
        self._loads: list[tuple[Path, Any, Any]] = []
        self.result = self._place(loaded, target, path)
        while self._todo:
            self._compare(*self._todo.popleft())

    def apply(self) -> Any:
        """Do it, and return the result.

        Raises:
            UnloadableError: a ``load_state_dict()`` raised.
        """
        with torch.no_grad():
            for tensor, loaded in self._copies:
                tensor.copy_(loaded)
        for container, contents in self._fills:
            _fill(container, contents)
        for path, value, state in self._loads:
            try:
                value.load_state_dict(state)
            except Exception as error:
                what = f"{type(value).__name__}.load_state_dict()"
                raise UnloadableError(describe(path), f"{what} raised {type(error).__name__}: {error}") from error
        return self.result

    def _place(self, loaded: Any, target: Any, path: Path) -> Any:
        """Return what takes the target's place."""
        if isinstance(target, torch.Tensor):
            return self._place_tensor(loaded, target, path)
        if is_stateful(target):
            state = loaded.state_dict() if is_stateful(loaded) else loaded
            self._loads.append((path, target, state))
            return target
        if isinstance(target, tuple) and type(target) is type(loaded):
            return self._place_tuple(loaded, target, path)
        if id(loaded) in self._placed:  # saved as one object, so it stays one
            return self._placed[id(loaded)]
        return self._place_container(loaded, target, path)

    def _place_container(self, loaded: Any, target: Any, path: Path) -> Any:
        if not _alike(loaded, target) or id(target) in self._taken:
            return self._instead(loaded, target, path)
        if id(target) in self._stands_for and not holds_state(target):
            return target if is_equal(self._stands_for[id(target)][1], loaded) else loaded
        self._stands_for[id(target)] = target, loaded
        self._placed[id(loaded)] = target
        self._taken.add(id(target))
        self._todo.append((loaded, target, path))
        return target

    def _place_tensor(self, loaded: Any, target: torch.Tensor, path: Path) -> Any:
        problem = object_difference(loaded, target, path)
        if problem is None:
            first, at = self._filled.setdefault(id(target), (loaded, path))
            if first is not loaded and not _same_values(first, loaded):
                self.problems.append(
                    f"{describe(at)} and {describe(path)}: are one tensor in the target, and have different values in the "
                    "checkpoint; give each a tensor of its own"
                )
            self._copies.append((target, loaded))
            return target
        if is_owned_tensor(target) or (self._strict and loaded is not None):
            self.problems.append(problem)
        self.replaced.append(path)
        return loaded

    def _place_tuple(self, loaded: Any, target: Any, path: Path) -> Any:
        merged = [
            self._place(one, target[index], (*path, index)) if index < len(target) else one
            for index, one in enumerate(loaded)
        ]
        for index in range(len(loaded), len(target)):
            self._absent(target[index], (*path, index))
        if len(merged) == len(target) and all(one is old for one, old in zip(merged, target, strict=True)):
            return target
        if all(one is new for one, new in zip(merged, loaded, strict=True)):
            return loaded
        return type(loaded)._make(merged) if hasattr(loaded, "_make") else type(loaded)(merged)

    def _instead(self, loaded: Any, target: Any, path: Path) -> Any:
        """Let what was saved take the place of a value of another kind."""
        tensors = list(tensor_paths(target, path))
        has_belongings = holds_belongings(target)
        if id(target) not in self._taken and (has_belongings or tensors):
            if has_belongings or (self._strict and loaded is not None):
                self.problems.append(
                    f"{describe(path)}: is a {type(target).__name__} in the target and a {type(loaded).__name__} "
                    "in the checkpoint"
                )
            self.replaced += tensors
        return loaded

    def _absent(self, value: Any, path: Path) -> bool:
        """Note that a value was not saved. Returns whether it stays."""
        if holds_belongings(value):
            self.missing.append(path)
            return True
        self.dropped += tensor_paths(value, path)
        return False

    def _compare(self, loaded: Any, target: Any, path: Path) -> None:
        if isinstance(target, Mapping):
            contents: Any = dict(loaded)
            for key, _ in in_one_order({key: key for key in loaded}):
                if key in target:
                    contents[key] = self._place(loaded[key], target[key], (*path, key))
            contents |= {
                key: value for key, value in target.items() if key not in loaded and self._absent(value, (*path, key))
            }
            if not isinstance(target, MutableMapping):
                if not is_equal(contents, dict(target)):
                    self.problems.append(f"{describe(path)}: is a {type(target).__name__}, which cannot be changed")
                return
        elif isinstance(target, list):
            contents = [
                self._place(one, target[index], (*path, index)) if index < len(target) else one
                for index, one in enumerate(loaded)
            ]
            rest = enumerate(target[len(loaded) :], len(loaded))
            contents += [value for index, value in rest if self._absent(value, (*path, index))]
        else:
            contents = loaded
        self._fills.append((target, contents))


def _alike(loaded: Any, target: Any) -> bool:
    """Tell whether a container of the target can be emptied and filled so that it equals the loaded one."""
    kind = type(target)
    for family in (Mapping, list):
        if isinstance(target, family) and isinstance(loaded, family) and holds_state(target):
            return True  # of whatever class: what is in it is restored in place
    if kind is not type(loaded):
        return False
    if kind is defaultdict:
        return bool(loaded.default_factory is target.default_factory)
    if kind is deque:
        return bool(loaded.maxlen == target.maxlen)
    return (kind in _MAPPINGS or kind in (list, set, bytearray)) and not (hasattr(loaded, "__dict__") and vars(loaded))


def _fill(container: Any, contents: Any) -> None:
    if isinstance(container, (list, bytearray)):
        container[:] = contents
    elif isinstance(container, deque):
        container.clear()
        container.extend(contents)
    elif type(container) in _MAPPINGS or isinstance(container, set):
        container.clear()
        container.update(contents)
    else:  # a class of its own: ask no more of it than is needed
        for key in [key for key in container if key not in contents]:
            del container[key]
        for key, value in contents.items():
            if key not in container or container[key] is not value:
                container[key] = value


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are certainly equal."""
    try:
        return torch.equal(one, other)
    except (RuntimeError, NotImplementedError):  # a layout that cannot be compared
        return False


def is_equal(one: Any, other: Any) -> bool:
    """Tell whether two values are certainly equal. Two tensors are if they are the same object."""
    if one is other:
        return True
    if type(one) is type(other) and isinstance(one, (dict, list, tuple)):
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(is_equal(value, other[key]) for key, value in one.items())
        return len(one) == len(other) and all(map(is_equal, one, other))
    if type(one) is not type(other) and isinstance(one, _SCALARS) and isinstance(other, _SCALARS):
        return False  # 1, 1.0 and True are equal
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001  # a class of the user's, or an array
        return False
