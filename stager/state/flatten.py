"""From a state as users give it to a state tree: its leaves (tensors and objects), and the structure that holds them.

What is a container and what a leaf follows ``torch.distributed.checkpoint`` (``_traverse.traverse_state_dict``), so that a
stock ``dcp.load`` with the same state finds the same names: mappings are containers; a list is one if a tensor, a mapping
or such a list is in it; everything else, tuples included, is a leaf. In addition:

    any value with state_dict() and      stands for its state dict, at any depth, whatever else it is
    load_state_dict()
    a mapping that is no dict or         a container with a recipe (``structure.build``), if its class builds it item by
    OrderedDict, or has other keys       item, as pickle would; else a leaf
    a tensor made of other tensors       a container with a recipe (``__tensor_flatten__``)
    a parameter, a tensor with grad,     a leaf with flags, and a recipe beside it if need be (``tensor_kinds``)
    attributes or a class of its own
    more than 64 leaves without a        one leaf: thousands of small values would cost each save a pickle apiece.
    tensor among them                    An optimizer's ``param_groups`` stay apart, as stock readers want them
    a container in itself, or deeper     one leaf
    than 100 levels

A leaf that is no plain tensor is pickled, which keeps its class, and what it has of references to itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from stager.state.containers import MAX_DEPTH, is_plain_key, is_terminal, plain_metadata, without_items
from stager.state.per_rank import PerRank, rank_key
from stager.state.shards import is_sharded, state_dict_of
from stager.state.state_tree import StateTree
from stager.state.stateful import is_stateful, is_stateful_class
from stager.state.tensor_kinds import (
    PLAIN_TENSORS,
    WholeTensor,
    flags_of,
    has_more,
    node_of,
    nodes_of,
    recipe_of,
    values_of,
)
from stager.workers.checkpoint.formats.object_pickle import pickle_object
from stager.workers.checkpoint.layout.structure import RECIPE, Node, Path, describe, key_names
from stager.workers.checkpoint.layout.tensor_node import TensorNode
from stager.workers.errors import StagerError, UnstageableError
from stager.workers.memory.tensor_memory import problem_of

_MAX_APART = 64  # so many leaves without a tensor are stored apart; with more, their container is one leaf


def _is_apart(kind: type) -> bool:
    """Tell whether values of a class, none of which is a tensor, have to be stored apart."""
    return kind is PerRank or is_stateful_class(kind)


def flatten(state: Mapping[str, Any], rank: int = 0, *, has_recipes: bool = True) -> StateTree:
    """Make the state tree of ``state``.

    Args:
        rank: the rank whose ``PerRank`` values these are.
        has_recipes: whether the format stores containers with recipes.

    Raises:
        UnstageableError: the state is no mapping, or the format cannot have one of its keys at the top.
    """
    if not isinstance(state, Mapping):
        raise UnstageableError("state", f"must be a mapping of names to values, not {type(state).__name__}")
    tree = StateTree(rank=rank, has_recipes=has_recipes)
    visitor = _Visitor(tree)
    tree.structure = visitor.visit_state(state)
    return tree


class _StoreOtherwiseError(Exception):
    """A container has to be stored in another way. None of these leaves this file."""


class _ContainsItselfError(_StoreOtherwiseError):
    """A container was met inside itself.

    Attributes:
        container: its identity.
    """

    def __init__(self, container: int) -> None:
        super().__init__()
        self.container = container


class _ManyLeavesError(_StoreOtherwiseError):
    """A container has many leaves, and perhaps none that has to be apart."""


class _Start(NamedTuple):
    """How many leaves, and values that have to be apart, there were before a container was visited."""

    num_leaves: int
    num_apart: int


class _NotApartError(_StoreOtherwiseError):
    """A container cannot be stored as its parts: it becomes a leaf."""


class _Visitor:
    """Visits a state, and fills its tree.

    Attributes:
        tree: what is filled.
    """

    def __init__(self, tree: StateTree) -> None:
        self.tree = tree
        self._open: set[int] = set()  # identities of the containers that are being visited
        self._values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by identity: a tensor with more, its values
        self._num_apart = 0  # how many tensors, Stateful and PerRank values were met: they cannot be put into one leaf
        self._start: _Start | None = None  # of the innermost container; None if it has to be visited whole

    def visit_state(self, state: Mapping[str, Any]) -> Node:
        """Visit the whole state. It is a container whatever its class, also if it contains itself."""
        try:
            with _code_of(state, ()):
                return self._mapping(state, ())
        except _NotApartError:
            pass
        for key in state:
            if not is_plain_key(key):
                raise _wrong_key(key, state, has_recipes=self.tree.has_recipes)
        # The values count, whatever holds them.
        if not isinstance(state, OrderedDict):
            return self._mapping(dict(state), ())
        plain: Any = OrderedDict(state)
        if (metadata := plain_metadata(state)) is not None:
            plain._metadata = metadata
        return self._mapping(plain, ())

    def visit(self, value: Any, path: Path) -> Node:
        if isinstance(value, torch.Tensor):  # nearly every leaf, and the abstract base classes below are slow to ask
            if type(value) in PLAIN_TENSORS:
                return self._tensor(value, path)
            with _code_of(value, path):
                return self._tensor(value, path)
        if type(value) is dict or not is_stateful(value):
            return self._plain(value, path)
        self._num_apart += 1
        self.tree.owners.append(value)
        try:
            return self._plain(_state_of(value, path), path)
        finally:
            self.tree.owners.pop()

    def _leaf(self, value: Any) -> Node:
        self.tree.leaves.append(value)
        return len(self.tree.leaves) - 1

    def _tensor(self, tensor: torch.Tensor, path: Path) -> Node:
        self._num_apart += 1
        if has_more(tensor):
            return self._tensor_with_more(tensor, path)
        return node_of(self._leaf(tensor), tensor)

    def _tensor_with_more(self, tensor: torch.Tensor, path: Path) -> Node:
        """Visit a tensor that has attributes, or a class of its own."""
        has_recipes = self.tree.has_recipes
        if torch.nn.parameter.is_lazy(tensor):  # it has no values, and says so to whoever asks
            return self._leaf(WholeTensor(tensor))
        if is_sharded(tensor):
            self.tree.has_shards = True
            return self._leaf(tensor)
        if problem_of(tensor) is not None:
            return self._leaf(tensor)
        if hasattr(tensor, "__tensor_flatten__"):
            return self._wrapper(tensor, path) if has_recipes else self._leaf(tensor)
        found = recipe_of(tensor)
        if found is None or not has_recipes:
            return self._leaf(tensor if type(tensor) not in PLAIN_TENSORS else WholeTensor(tensor))
        recipe, is_parameter = found
        # The recipe comes first, as in the order of ``structure.leaves``.
        recipes = [self._leaf(recipe)] if recipe.kind is not None or recipe.state else []
        _, values = self._values.setdefault(id(tensor), (tensor, values_of(tensor)))  # one object stays one
        return TensorNode(self._leaf(values), flags_of(tensor, is_parameter=is_parameter), recipes).to_node()

    def _wrapper(self, tensor: Any, path: Path) -> Node:
        """Visit a tensor that is made of others: those are leaves; what binds them together is the recipe."""
        if tensor.is_nested:
            return self._leaf(tensor)  # each kind has a place of its own further down
        names, context = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        sizes = [*tensor.shape, *tensor.stride()]
        if not all(type(size) is int for size in sizes) or not all(isinstance(part, torch.Tensor) for part in parts):
            return self._leaf(tensor)
        recipe = (type(tensor), context, tensor.shape, tuple(tensor.stride()), tensor.requires_grad)
        return self._with_recipe("wrapper", recipe, list(names), parts, path)

    def _with_recipe(self, kind: str, recipe: Any, names: list[str], values: list[Any], path: Path) -> Node:
        first = self._leaf(recipe)
        children = self._children(names, values, path)
        return [kind, [RECIPE, *names], [first, *children]]

    def _plain(self, value: Any, path: Path) -> Node:
        """Visit a value that is not asked for its ``state_dict()``."""
        if type(value) is PerRank:
            return self._per_rank(value, path)
        if isinstance(value, Mapping) or (isinstance(value, list) and not is_terminal(value, len(path))):
            return self._container(value, path)
        return self._leaf(value)

    def _container(self, value: Mapping[Any, Any] | list[Any], path: Path) -> Node:
        """Visit a mapping or a list; make it a leaf if it cannot be stored as its parts, or had better not be."""
        tree, identity = self.tree, id(value)
        if identity in self._open:
            raise _ContainsItselfError(identity)
        if len(path) >= MAX_DEPTH:
            return self._leaf(value)
        if type(value) is dict and (node := self._dict_of_tensors(value)) is not None:
            return node
        before = len(tree.leaves), len(tree.odd_keys), self._num_apart
        self._open.add(identity)
        outer, self._start = self._start, _Start(before[0], before[2])
        try:
            try:
                node = self._parts(value, path)
            except _ManyLeavesError:
                self._forget(before)
                if self._pickle_whole(value):
                    return self._leaf(value)
                self._start = None  # something in it has to be apart: visit all of it
                node = self._parts(value, path)
            if self._num_apart > before[2] or len(tree.leaves) - before[0] <= _MAX_APART:
                return node
        except _ContainsItselfError as error:
            if error.container != identity:
                raise
        except _NotApartError:
            pass
        finally:
            self._open.discard(identity)
            self._start = outer
        self._forget(before)
        return self._leaf(value)

    def _dict_of_tensors(self, value: dict[Any, Any]) -> Node:
        """Visit a dict of plain tensors the short way, which an optimizer has thousands of; None if it is another."""
        for first in value.values():
            if type(first) not in PLAIN_TENSORS:
                return None
            break
        keys = list(value)
        kinds = set(map(type, keys))
        children = self._plain_tensors(list(value.values())) if kinds <= _KEY_TYPES else None
        if not children:
            return None
        self._note_keys(keys, kinds)
        return ["dict", keys, children]

    def _plain_tensors(self, values: list[Any]) -> list[Node] | None:
        """Make leaves of values if all are plain tensors; None if some value is something else."""
        leaves = self.tree.leaves
        nodes = nodes_of(values, len(leaves))
        if nodes is not None:
            leaves += values
            self._num_apart += len(values)
        return nodes

    def _note_keys(self, keys: list[Any], kinds: set[type]) -> None:
        if kinds - {str}:
            self.tree.odd_keys.append(tuple(map(type, keys) if float not in kinds else map(repr, keys)))

    def _parts(self, value: Mapping[Any, Any] | list[Any], path: Path) -> Node:
        self._num_apart += _is_param_groups(value, path)
        with _code_of(value, path):
            return self._sequence(value, path) if isinstance(value, list) else self._mapping(value, path)

    def _children(self, keys: Iterable[Any], values: Iterable[Any], path: Path) -> list[Node]:
        """Visit the values of a container.

        Raises:
            _ManyLeavesError: there are many, and nothing among those that were visited has to be apart.
        """
        children, start, leaves = [], self._start, self.tree.leaves
        for key, value in zip(keys, values, strict=True):
            children.append(self.visit(value, (*path, key)))
            if start is not None and len(leaves) - start.num_leaves > _MAX_APART and self._num_apart == start.num_apart:
                raise _ManyLeavesError
        return children

    def _pickle_whole(self, value: Any) -> bool:
        """Pickle a container, and tell whether it can be one leaf: that takes a tenth of the time of visiting it all."""
        try:
            pickled = pickle_object(value, 0, with_tensors=False)
        except Exception:  # noqa: BLE001  # has tensors, or cannot be pickled: the visit says what it is, and where
            return False
        if b"param_groups" in pickled.blob or any(map(_is_apart, pickled.kinds)):
            return False
        self.tree.pickled[id(value)] = value, pickled
        return True

    def _forget(self, before: tuple[int, int, int]) -> None:
        """Drop what was visited since: it becomes one leaf."""
        tree = self.tree
        del tree.leaves[before[0] :]
        del tree.odd_keys[before[1] :]
        tree.private -= set(range(before[0], max(tree.private, default=-1) + 1))

    def _per_rank(self, value: PerRank, path: Path) -> Node:
        tree = self.tree
        if tree.owners:  # load_state_dict() would be given the values of all ranks
            raise UnstageableError(
                describe(path),
                f"is a PerRank value inside the state of a {type(tree.owners[-1]).__name__}; "
                "wrap that whole object in PerRank",
            )
        self._num_apart += 1
        key, first = rank_key(tree.rank), len(tree.leaves)
        node = ["dict", [key], [self.visit(value.value, (*path, key))]]
        tree.private.update(range(first, len(tree.leaves)))
        return node

    def _sequence(self, value: list[Any], path: Path) -> Node:
        if type(value) is list:
            return ["list", self._children(range(len(value)), value, path)]
        if not self.tree.has_recipes or (empty := without_items(value, 3)) is None:
            raise _NotApartError
        return self._with_recipe("sequence", (empty,), list(map(str, range(len(value)))), list(value), path)

    def _mapping(self, value: Mapping[Any, Any], path: Path) -> Node:
        kind, keys = type(value), list(value)
        kinds = set(map(type, keys))
        has_names = kinds <= _KEY_TYPES or all(map(is_plain_key, keys))
        metadata = plain_metadata(value) if kind is OrderedDict else None
        if kind not in _PLAIN or not has_names or (kind is OrderedDict and self._has_more(value, metadata)):
            return self._other_mapping(value, keys, has_names, path)
        self._note_keys(keys, kinds)
        values = list(value.values())
        children = self._plain_tensors(values)  # what most states are made of
        if children is None:
            children = self._children(keys, values, path)
        if kind is OrderedDict:
            return ["odict", keys, children, metadata]
        return ["dict", keys, children]

    def _has_more(self, value: Any, metadata: Any) -> bool:
        """Tell whether an OrderedDict has attributes that its node cannot hold.

        Without recipes, what else is in ``_metadata`` is dropped: a module's state dict must not become one pickled leaf.
        """
        if not self.tree.has_recipes:
            return bool(vars(value).keys() - {"_metadata"})
        return bool(vars(value) != ({} if metadata is None else {"_metadata": metadata}))

    def _other_mapping(self, value: Mapping[Any, Any], keys: list[Any], has_names: bool, path: Path) -> Node:
        if not self.tree.has_recipes:
            raise _NotApartError
        empty = None
        if type(value) is not dict and (empty := without_items(value, 4)) is None:
            raise _NotApartError
        names = key_names(keys)
        recipe = empty, None if names == keys else keys
        return self._with_recipe("mapping", recipe, names, list(value.values()), path)


def _state_of(value: Any, path: Path) -> Any:
    with _code_of(value, path, "state_dict()"):
        return state_dict_of(value) if isinstance(value, torch.nn.Module) else value.state_dict()


@contextmanager
def _code_of(value: Any, path: Path, what: str = "taking it apart") -> Iterator[None]:
    """Name the value whose own code raised. Its class may be of the user, and do anything when it is asked for its parts."""
    try:
        yield
    except (StagerError, _StoreOtherwiseError):
        raise
    except Exception as error:
        raise UnstageableError(
            describe(path), f"{type(value).__name__}: {what} raised {type(error).__name__}: {error}; nothing was saved"
        ) from error


_PLAIN = (dict, OrderedDict)
_KEY_TYPES = {str, int, bool, type(None)}  # JSON can hold any value of these


def _wrong_key(key: Any, state: Mapping[Any, Any], *, has_recipes: bool) -> UnstageableError:
    """Make the error for a key at the top that is not plain, in a state that cannot be taken apart."""
    if has_recipes:  # with them, a dict can have any keys
        where, instead = f"which a {type(state).__name__} cannot have at the top", "give a dict"
    else:
        where = "and with persistence.format: torch a key at the top must be text or a finite number"
        instead = "set persistence.format to dcp"
    reason = f"has the key {key!r} (a {type(key).__name__}), {where}; name the entry by a text, or {instead}"
    return UnstageableError("state", reason)


def _is_param_groups(value: Any, path: Path) -> bool:
    return path[-1] == "param_groups" and isinstance(value, list)
