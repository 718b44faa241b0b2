"""Checkpoints by their path, whoever wrote them: stager, ``dcp.save``, ``torch.save`` or safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from stager.loading.dcp.stock import StockReader
from stager.loading.pickles.archive_check import check_archive
from stager.loading.pickles.unpickle import load_archive
from stager.loading.restore import Restorer
from stager.loading.safetensors_file import is_safetensors, load_safetensors
from stager.loading.selection import Selection
from stager.loading.values import restore_values, selected_values
from stager.workers.checkpoint.directory.files import open_regular, storage_errors
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME, read_manifest
from stager.workers.checkpoint.directory.read_lock import reading
from stager.workers.checkpoint.read.verify import default_threads
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError

_empty_planner: Any = _EmptyStateDictLoadPlanner  # its constructor has no types; what dcp_to_torch_save uses


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
) -> Any:
    """Load one checkpoint, which need not be stager's.

    Args:
        path: a directory of stager (``.../step-00000100``) or of ``dcp.save``, or a file of ``torch.save`` or safetensors.
        into, strict: as in :meth:`stager.Checkpointer.load`. From what is not stager's, the state is read into new memory
            first and copied from there.
        keys: as in :meth:`stager.Checkpointer.load`. Of what is not stager's, all is read first.
        allow_pickle: unpickle any object, which runs code from the checkpoint.

    Returns:
        The state, on the CPU, or ``into``. Keys of a checkpoint of ``dcp.save`` are strings; what was sharded is whole.

    Raises:
        CheckpointNotFoundError: there is nothing of the kind.
        CorruptCheckpointError: it is damaged, or says something impossible.
        UnsafePickleError: see ``allow_pickle``; nothing was changed.
        StateMismatchError: it does not fit ``into``; nothing was changed.
        StorageError
    """
    path = os.path.realpath(os.fspath(path))
    origin = origin_of(path)
    selection = None if keys is None else Selection(keys)
    if origin is Origin.STAGER:
        with reading(path):
            restorer = Restorer(path, read_manifest(path), default_threads(), allow_pickle, selection)
            if into is None:
                return restorer.load()
            restorer.load_into(into, strict)
            return into
    state = _load_foreign(path, origin, allow_pickle)
    if into is None and selection is None:
        return state
    if not isinstance(state, Mapping):
        raise UsageError(f"{path}: holds a {type(state).__name__}, not a mapping; load it without into and keys")
    if into is None:
        assert selection is not None
        return selected_values(state, path, selection)
    restore_values(state, path, into, strict, selection)
    return into


def _load_foreign(path: str, origin: Origin, allow_pickle: bool) -> Any:
    if origin is Origin.DCP:
        return load_dcp(path, allow_pickle)
    if origin is Origin.SAFETENSORS:
        return load_safetensors(path, default_threads())
    return load_torch_save(path, allow_pickle)


def origin_of(path: str) -> Origin:
    """By what is there; nothing is read of it but names, and a file's first bytes.

    Raises:
        CheckpointNotFoundError: nothing that could be a checkpoint.
    """
    if os.path.isfile(path):
        return Origin.SAFETENSORS if is_safetensors(path) else Origin.TORCH_SAVE
    if os.path.lexists(os.path.join(path, MANIFEST_NAME)):
        return Origin.STAGER
    if os.path.lexists(os.path.join(path, ".metadata")):
        return Origin.DCP
    raise CheckpointNotFoundError(None, "not a checkpoint: no file, no manifest.json, no .metadata", path)


def load_torch_save(path: str, allow_pickle: bool, map_location: str = "cpu") -> Any:
    """What ``torch.save`` wrote; with ``map_location="meta"`` without its data.

    Raises:
        CorruptCheckpointError, UnsafePickleError, UsageError, StorageError
    """
    name = os.path.basename(path)
    with storage_errors("open", path):
        file = open(open_regular(path), "rb")  # noqa: SIM115  (it is closed two lines below)
    with file, storage_errors("read", path):
        check_archive(file, os.fstat(file.fileno()).st_size, name, path, pickles=not allow_pickle)
        return load_archive(f"/proc/self/fd/{file.fileno()}", name, path, allow_pickle, map_location)


def load_dcp(path: str, allow_pickle: bool) -> dict[str, Any]:
    """What ``dcp.save`` wrote, of all ranks, on the CPU.

    Raises:
        CorruptCheckpointError, UnsafePickleError, UsageError, StorageError
    """
    reader = StockReader(path, allow_pickle)
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
