"""Loading a checkpoint by its path, whoever wrote it: stager, ``dcp.save``, ``torch.save`` or safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from stager.config.calls import explained
from stager.config.host import reading_threads
from stager.loading.checkpoint_files import CheckpointFiles
from stager.loading.dcp.stock_checkpoint import StockCheckpoint
from stager.loading.foreign_path import Found, Origin, find
from stager.loading.foreign_restore import ForeignCheckpoint, restore_foreign
from stager.loading.foreign_values import LoadedValues
from stager.loading.loaded import Loaded
from stager.loading.pickles.archive_check import check_archive
from stager.loading.pickles.legacy import check_legacy, is_legacy, load_legacy
from stager.loading.pickles.unpickle import load_unverified
from stager.loading.rank_names import ranks_of_this_job
from stager.loading.renaming import Renaming
from stager.loading.restore import Restorer
from stager.loading.safetensors_reader import SafetensorsFiles
from stager.loading.selection import Selection
from stager.state.stateful import Stateful
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import resolved
from stager.workers.checkpoint.storage.posix.files import open_regular, storage_errors
from stager.workers.errors import UnsafePickleError, UsageError


@explained('load_checkpoint("runs/gpt/step-00000100")')
def load_checkpoint(
    path: str | os.PathLike[str],
    into: MutableMapping[str, Any] | Stateful | None = None,
    strict: bool = True,
    *,
    keys: str | Sequence[str] | None = None,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    strip_prefix: str | None = None,
    allow_pickle: bool = False,
    safe_globals: Sequence[str] = (),
) -> Loaded[int | None]:
    """Load one checkpoint by its path; stager need not have written it.

    Args:
        path: a directory of stager (``.../step-00000100``) or of ``dcp.save``; a file of ``torch.save`` or safetensors; a
            directory of safetensors, with an index if there are several files.
        into: as in :meth:`stager.Checkpointer.load`, DTensors and FSDP2 modules too. Or one object, if the checkpoint is its
            state dict, or has one value that fits. The state of a checkpoint that stager did not write is first read into
            new memory and then copied, so that an error while it is read changes nothing.
        strict: as in :meth:`stager.Checkpointer.load`.
        keys: as in :meth:`stager.Checkpointer.load`. A file of ``torch.save`` is read whole all the same.
        rename, strip_prefix: as in :meth:`stager.Checkpointer.load`.
        allow_pickle: unpickle any object, which runs code from the checkpoint.
        safe_globals: classes that may be unpickled, beside plain data, by their full names, as ``loading.safe_globals`` has
            them for :meth:`stager.Checkpointer.load`.

    Each rank loads for itself, and may call this alone. Names that other ranks have in their ``into``, as the stages of a
    pipeline do, are not unexpected here: a rank with such names waits up to 30 s for the others' calls for the same path.

    Returns:
        The state on the CPU, or ``into``; ``step`` and ``info`` are None unless stager wrote the checkpoint. Without
        ``into``, the keys of a checkpoint of ``dcp.save`` are strings, and its sharded tensors are whole. With it, keys have
        the types that they have there.

    Raises:
        CheckpointNotFoundError: there is no checkpoint at ``path``; says what there is, and what to name instead.
        ArgumentError: ``path`` or ``into`` cannot be meant.
        UsageError: the file is of another kind (TorchScript, NumPy, ...); says of which.
        ConfigError: a name in ``safe_globals`` cannot be imported.
        CorruptCheckpointError: it is damaged, or contradicts itself.
        UnsafePickleError: see ``allow_pickle``; nothing was changed.
        StateMismatchError: it does not fit ``into``; nothing was changed.
        UnloadableError: as in :meth:`stager.Checkpointer.load`.
        StorageError
    """
    path = place_path(path, "the path of the checkpoint")
    found = find(path)
    where = resolved(path)
    selection = None if keys is None else Selection(keys)
    renaming = Renaming.of_arguments(rename, strip_prefix)
    others, rank = ranks_of_this_job(where, into, strict=strict)
    if found.origin is Origin.STAGER:
        with reading(where):
            manifest = read_manifest(where)
            restorer = Restorer(
                where,
                manifest,
                reading_threads(),
                allow_pickle,
                selection,
                rank,
                safe_globals=safe_globals,
                renaming=renaming,
                other_ranks=others,
            )
            state = restorer.restore(into, strict)
        info, files = CheckpointInfo.of(where, manifest), CheckpointFiles(where, manifest)
        return Loaded(manifest.header.step, where, state, info, *restorer.outcome, files)
    if found.origin is Origin.TORCH_SAVE and into is None and selection is None and renaming == Renaming():
        return Loaded(None, where, load_torch_save(found.path, allow_pickle, safe_globals=safe_globals), None)
    source = _open(found, allow_pickle, safe_globals)
    state, outcome = restore_foreign(source, into, strict, selection, renaming, others)
    return Loaded(None, where, state, None, *outcome)


def _open(found: Found, allow_pickle: bool, safe_globals: Sequence[str]) -> ForeignCheckpoint:
    if found.origin is Origin.SAFETENSORS:
        return SafetensorsFiles(found.path, reading_threads())
    if found.origin is Origin.DCP:
        return StockCheckpoint(found.path, allow_pickle, safe_globals)
    try:
        values = load_torch_save(found.path, allow_pickle, safe_globals=safe_globals)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{error}. If the file holds an object as a whole, as torch.save(model, path) writes it, and "
            "you trust its origin, load it by load_checkpoint(path, allow_pickle=True), without the arguments into and keys"
        ) from error
    if not isinstance(values, Mapping):
        permission = ", allow_pickle=True" if allow_pickle else ""
        raise UsageError(
            f"{found.path}: holds a {type(values).__name__}, not a mapping; load it without into and keys, by "
            f"load_checkpoint(path{permission}).state"
        )
    return LoadedValues(found.path, values)


def load_torch_save(path: str, allow_pickle: bool, map_location: str = "cpu", safe_globals: Sequence[str] = ()) -> Any:
    """Load a file of ``torch.save``; with ``map_location="meta"`` without the data of tensors.

    Raises:
        CorruptCheckpointError, UnsafePickleError, UsageError, StorageError
    """
    with storage_errors("open", path):
        fd = open_regular(path)
    with open(fd, "rb") as file, storage_errors("read", path):
        nbytes, source = os.fstat(file.fileno()).st_size, f"/proc/self/fd/{file.fileno()}"
        if is_legacy(file.peek()):
            if not allow_pickle:
                check_legacy(file, nbytes, path)
            return load_unverified(source, path, allow_pickle, map_location, safe_globals, load_legacy)
        check_archive(file, nbytes, "the file", path, pickles=not allow_pickle)
        return load_unverified(source, path, allow_pickle, map_location, safe_globals)
