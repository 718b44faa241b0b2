"""Pickles the leaves that are no plain tensors, as the format wants them, and says early what loading will refuse."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from stager.config.arguments import shown
from stager.state.state_tree import StateTree
from stager.state.tensor_kinds import TensorRecipe, WholeTensor
from stager.workers.checkpoint.formats import Format
from stager.workers.checkpoint.formats.object_pickle import PickledObject
from stager.workers.checkpoint.formats.safe_globals import refusal_of, refused_classes
from stager.workers.errors import UnstageableError

logger = logging.getLogger("stager")

_CACHED_TYPES = (type(None), bool, int, str)  # hashable, and equal only when they are the same in every bit
_CACHED_BLOBS = 4096


class ObjectPickler:
    """Pickles objects. What it warns of, it warns of once in a run.

    Args:
        file_format: how objects are pickled.
        safe_globals: classes that loading will allow, beside plain data; None: it will allow all.
    """

    def __init__(self, file_format: Format, safe_globals: Sequence[str] | None) -> None:
        self._format = file_format
        self._safe_globals = safe_globals
        self._blobs: dict[tuple[type, Any], bytes] = {}
        self._checked: set[type] = set()
        self._warned: set[str] = set()

    def forget(self) -> None:
        """Drop the pickles of plain values that were kept for the next save."""
        self._blobs.clear()

    def pickle(self, tree: StateTree, leaf: int) -> bytes:
        """Return the pickle of a leaf.

        Raises:
            UnstageableError: it cannot be pickled; names its key path.
        """
        value = tree.leaves[leaf]
        value = value.tensor if type(value) is WholeTensor else value
        kind = type(value)
        if kind in _CACHED_TYPES and (blob := self._blobs.get((kind, value))) is not None:
            return blob
        try:
            _, found = tree.pickled.get(id(value), (None, None))
            blob, kinds = found or self._object_blob(tree, leaf, value)
        except Exception as error:
            raise UnstageableError(tree.name(leaf), why_not_pickled(value, error)) from error
        if kind in _CACHED_TYPES and len(self._blobs) < _CACHED_BLOBS:
            self._blobs[kind, value] = blob
        if isinstance(value, torch.Tensor) and value.is_meta and "meta" not in self._warned:
            self._warned.add("meta")
            logger.warning(
                "%s is on the meta device: its shape is saved and no values, as torch.save does; if it was to have "
                "values, materialize the model (to_empty() and load, or build it on a real device) before it is saved",
                tree.name(leaf),
            )
        if not kinds <= self._checked:
            self._checked |= kinds
            self._warn_if_refused(tree.name(leaf), blob, value)
        return blob

    def _object_blob(self, tree: StateTree, leaf: int, value: Any) -> PickledObject:
        if type(value) is not TensorRecipe:
            return self._format.object_blob(value, leaf)
        try:
            return self._format.object_blob(tuple(value), leaf)  # a plain one: readers do not have our class
        except Exception as error:  # noqa: BLE001  # whatever the attributes' classes raise
            name, reason = tree.name(leaf), str(error).partition("\n")[0]
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "%s cannot be pickled (%s): the tensor is saved without its attributes; "
                    "remove those that need not be saved",
                    name,
                    reason,
                )
            return self._format.object_blob(tuple(value.without_attributes()), leaf)

    def _warn_if_refused(self, name: str, blob: bytes, value: object) -> None:
        """Say at save time, not weeks later, that loading this will need permission. Once for each class."""
        if (reason := refusal_of(blob, self._safe_globals or ())) is None:
            return
        if isinstance(value, FunctionType | MethodType):
            logger.warning(
                "%s is %s, not what it returns; if that is meant, call it: write %s(). Loading it as it is will need "
                "permission, such as allow_pickle=True",
                name,
                _described(value),
                value.__name__,
            )
            return
        if self._safe_globals is None:
            return
        new = set(refused_classes(blob, self._safe_globals) or [reason]) - self._warned
        self._warned |= new
        if new:
            logger.warning(
                "%s is pickled, and weights_only rules do not allow it (%s). To load it, you will need "
                "load(allow_pickle=True), or the setting loading.safe_globals: [%s]. To avoid this, save its values as a "
                "dict of numbers, texts and tensors",
                name,
                reason,
                ", ".join(sorted(new)),
            )


def why_not_pickled(value: object, error: Exception) -> str:
    """Say why a value of a state cannot be saved, and what to do.

    Args:
        error: what its pickling raised.
    """
    if isinstance(value, ModuleType):
        return (
            f"is the Python module {value.__name__!r}, which cannot be pickled; leave it out of the state, or save the "
            "values that you need from it"
        )
    reason = str(error) or type(error).__name__
    if len(error.args) == 2 and "{}" in str(error.args[0]):  # of torch's DataLoader, which forgets to format
        reason = str(error.args[0]).replace("{}", str(error.args[1]))
    first_line = reason.partition("\n")[0]
    advice = "leave it out of the state, or save values that it can be made from"
    return f"{shown(value)} cannot be pickled: {first_line}; {advice}"


def _described(function: FunctionType | MethodType) -> str:
    if isinstance(function, FunctionType):
        return f"the function {function.__name__}"
    owner = function.__self__
    name = owner.__name__ if isinstance(owner, type) else f"a {type(owner).__name__}"
    return f"the method {function.__name__} of {name}"
