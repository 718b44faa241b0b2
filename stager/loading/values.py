"""From a state that is in memory into values that are there already, by the rules of a checkpoint's (``restore.py``)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from stager.loading.match import match, refuse
from stager.loading.restore import settle, sharing_memory
from stager.loading.selection import Selection
from stager.state.flatten import flatten
from stager.workers.checkpoint.directory.manifest import Manifest, ManifestHeader
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.structure import build


def restore_values(
    state: Mapping[str, Any],
    path: str,
    target: MutableMapping[str, Any],
    strict: bool,
    selection: Selection | None = None,
) -> None:
    """
    Args:
        state: what was loaded.
        path: of the file it is from, for messages.
        selection: only this part.
        target, strict: see :meth:`stager.loading.restore.Restorer.load_into`.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ; nothing was changed.
        UnstageableError: ``state`` has keys that are none for a state.
    """
    flat = flatten(state)
    items = tuple(map(_item, flat.leaves))
    manifest = Manifest(ManifestHeader("", 0, "", 0.0, "", ""), Layout((), items, flat.structure, 1), (), ())
    found = match(manifest, path, target, strict, selection)
    values = dict(enumerate(flat.leaves))
    refuse(path, [problem for check in found.checks if (problem := check(values)) is not None])
    settle(values, found.targets)
    shared = sharing_memory(found.targets)
    values |= {index: tensor for index, tensor in reversed(found.targets) if index not in shared}
    for step in found.steps:
        step(values)


def selected_values(state: Mapping[str, Any], path: str, selection: Selection) -> Any:
    """
    Raises:
        StateMismatchError: nothing is selected.
    """
    flat = flatten(state)
    return build(selection.of(flat.structure, path), flat.leaves.__getitem__)


def _item(leaf: object) -> Item:
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_nested:
        return Item("object", 0, 0, 0, 0, 0, "", (), ())
    dtype = name_of(leaf.dtype)
    return Item("tensor", 0, 0, 0, 0, 0, dtype, tuple(leaf.shape), leaf.stride())
