"""Loading a checkpoint by its path, whoever wrote it: stager, ``dcp.save``, ``torch.save`` or safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from stager.loading.dcp.stock import StockReader
from stager.loading.loaded import Loaded
from stager.loading.match import match
from stager.loading.pickles.archive_check import check_archive
from stager.loading.pickles.unpickle import load_unverified
from stager.loading.reading.direct_read import overlapping
from stager.loading.restore import Restorer, copy_to_targets
from stager.loading.safetensors_reader import is_safetensors, load_safetensors
from stager.loading.selection import Selection
from stager.state.flatten import flatten
from stager.state.tensor_kinds import WholeTensor
from stager.workers.checkpoint.directory.files import open_regular, storage_errors
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME, Manifest, ManifestHeader, read_manifest
from stager.workers.checkpoint.directory.read_lock import reading
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.read.verify import default_threads
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError

_empty_planner: Any = _EmptyStateDictLoadPlanner  # torch gives its constructor no types; dcp_to_torch_save uses it too


class Origin(Enum):
    """Who wrote a checkpoint."""

    STAGER = "stager"
    DCP = "torch.distributed.checkpoint.save"
    TORCH_SAVE = "torch.save"
    SAFETENSORS = "safetensors"


def load_checkpoint(
    path: str | os.PathLike[str],
    into: MutableMapping[str, Any] | None = None,
    strict: bool = True,
    *,
    keys: str | Sequence[str] | None = None,
    allow_pickle: bool = False,
    safe_globals: Sequence[str] = (),
) -> Loaded[int | None]:
    """Load one checkpoint by its path; stager need not have written it.

    Args:
        path: a directory of stager (``.../step-00000100``) or of ``dcp.save``, or a file of ``torch.save`` or safetensors.
        into: as in :meth:`stager.Checkpointer.load`. The state of a checkpoint that stager did not write is first read into
            new memory and then copied.
        strict: as in :meth:`stager.Checkpointer.load`.
        keys: as in :meth:`stager.Checkpointer.load`. A checkpoint that stager did not write is read whole all the same.
        allow_pickle: unpickle any object, which runs code from the checkpoint.
        safe_globals: classes that may be unpickled, beside plain data, by their full names, as ``loading.safe_globals`` has
            them for :meth:`stager.Checkpointer.load`.

    Returns:
        The state on the CPU, or ``into``; ``step`` and ``info`` are None unless stager wrote the checkpoint. The keys of a
        checkpoint of ``dcp.save`` are strings, and its sharded tensors are whole.

    Raises:
        CheckpointNotFoundError: there is no checkpoint at ``path``.
        ConfigError: a name in ``safe_globals`` cannot be imported.
        CorruptCheckpointError: it is damaged, or contradicts itself.
        UnsafePickleError: see ``allow_pickle``; nothing was changed.
        StateMismatchError: it does not fit ``into``; nothing was changed.
        StorageError
    """
    path = os.path.realpath(os.fspath(path))
    origin = origin_of(path)
    selection = None if keys is None else Selection(keys)
    if origin is Origin.STAGER:
        with reading(path):
            manifest = read_manifest(path)
            restorer = Restorer(path, manifest, default_threads(), allow_pickle, selection, safe_globals=safe_globals)
            state = restorer.restore(into, strict)
        return Loaded(manifest.header.step, path, state, CheckpointInfo.of(path, manifest))
    state = _load_foreign(path, origin, allow_pickle, safe_globals)
    if into is not None or selection is not None:
        if not isinstance(state, Mapping):
            raise UsageError(f"{path}: holds a {type(state).__name__}, not a mapping; load it without into and keys")
        state = _restore_values(state, path, into, strict, selection)
    return Loaded(None, path, state, None)


def _restore_values(
    state: Mapping[str, Any],
    path: str,
    into: MutableMapping[str, Any] | None,
    strict: bool,
    selection: Selection | None,
) -> Any:
    """Restore a state that is in memory, by the rules that :class:`Restorer` has for a checkpoint of stager.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ; nothing was changed. Or nothing is selected.
        UnstageableError: ``state`` has keys that a checkpoint of stager cannot have.
    """
    flat = flatten(state)
    leaves = [leaf.tensor if type(leaf) is WholeTensor else leaf for leaf in flat.leaves]
    if into is None:
        assert selection is not None
        return build(selection.of(flat.structure, path), leaves.__getitem__)
    layout = Layout((), tuple(map(_item_of, leaves)), flat.structure, 1)
    plan = match(Manifest(ManifestHeader("", 0, "", 0.0, "", ""), layout, (), ()), path, into, strict, selection)
    values = dict(enumerate(leaves))
    plan.refuse_failed_checks(path, values)
    copy_to_targets(values, plan.targets)
    shared = overlapping(plan.targets)
    values |= {index: tensor for index, tensor in reversed(plan.targets) if index not in shared}
    plan.apply(values, path)
    return into


def _item_of(leaf: object) -> Item:
    """What stager would have stored for a leaf, as far as matching asks for it."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_nested:
        return Item("object", 0, 0, 0, 0, 0, "", (), ())
    return Item("tensor", 0, 0, 0, 0, 0, name_of(leaf.dtype), tuple(leaf.shape), leaf.stride())


def _load_foreign(path: str, origin: Origin, allow_pickle: bool, safe_globals: Sequence[str]) -> Any:
    if origin is Origin.DCP:
        return load_dcp(path, allow_pickle, safe_globals)
    if origin is Origin.SAFETENSORS:
        return load_safetensors(path, default_threads())
    return load_torch_save(path, allow_pickle, safe_globals=safe_globals)


def origin_of(path: str) -> Origin:
    """Tell who wrote the checkpoint, from the names of its files or the first bytes of the file.

    Raises:
        CheckpointNotFoundError: there is nothing that could be a checkpoint.
    """
    if os.path.isfile(path):
        return Origin.SAFETENSORS if is_safetensors(path) else Origin.TORCH_SAVE
    if os.path.lexists(os.path.join(path, MANIFEST_NAME)):
        return Origin.STAGER
    if os.path.lexists(os.path.join(path, ".metadata")):
        return Origin.DCP
    raise CheckpointNotFoundError(
        None, "is not a checkpoint: neither a file nor a directory with a manifest.json or .metadata", path
    )


def load_torch_save(path: str, allow_pickle: bool, map_location: str = "cpu", safe_globals: Sequence[str] = ()) -> Any:
    """Load a file of ``torch.save``; with ``map_location="meta"`` without the data of tensors.

    Raises:
        CorruptCheckpointError, UnsafePickleError, UsageError, StorageError
    """
    name = os.path.basename(path)
    with storage_errors("open", path):
        fd = open_regular(path)
    with open(fd, "rb") as file, storage_errors("read", path):
        check_archive(file, os.fstat(file.fileno()).st_size, name, path, pickles=not allow_pickle)
        source = f"/proc/self/fd/{file.fileno()}"
        return load_unverified(source, name, path, allow_pickle, map_location, safe_globals)


def load_dcp(path: str, allow_pickle: bool, safe_globals: Sequence[str] = ()) -> dict[str, Any]:
    """Load a checkpoint of ``dcp.save``, the data of all its ranks, on the CPU.

    Raises:
        CorruptCheckpointError, UnsafePickleError, UsageError, StorageError
    """
    reader = StockReader(path, allow_pickle, safe_globals)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {}
    planner: LoadPlanner = _empty_planner()
    with torch.device("cpu"), storage_errors("read", path):
        try:
            planner.set_up_planner(state, metadata, is_coordinator=True)
            plans = planner.create_global_plan([planner.create_local_plan()])
            reader.read_data(planner.finish_plan(plans[0]), planner, metadata)
        except (RuntimeError, ValueError, KeyError, AssertionError, EOFError) as error:
            raise CorruptCheckpointError(path, f"cannot be read: {error}") from error
    return state
