"""From a committed checkpoint to a directory of weights that transformers, vLLM and others load.

1. Open the files of the checkpoint, and read its own sidecars (``source.py``, ``sidecars.py``). From here on, a later save
   may replace the checkpoint: the export has all that it needs.
2. Take the part that is asked for (``part.py``), and name its tensors (``weight_names.py``).
3. Divide them into files, and say where the bytes of each go (``shards.py``). Nothing has been written so far.
4. Copy them in threads (``shard_writer.py``). Each hash is checked on the way, dtypes are converted.
5. Write the index and the sidecars.
6. All files are synced. Only now the directory gets its name (``new_directory.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import SupportsIndex

import torch

from stager.config.arguments import as_step
from stager.config.calls import explained
from stager.exporting.conversion import dtype_in_file, dtype_named
from stager.exporting.new_directory import MARKER, new_directory
from stager.exporting.shard_writer import write_shards
from stager.exporting.shards import INDEX_NAME, Shard, Weight, index_of, shards_of, total_nbytes
from stager.exporting.sidecars import Sidecar, sidecars_of, with_own
from stager.exporting.source import Source, chosen_checkpoint, opening
from stager.exporting.tensor_copier import TensorCopier
from stager.exporting.weight_names import Rename, WeightNames, name_weights
from stager.exporting.weights_export import WeightsExport, budget_of, part_of, resolved, shard_bytes_of
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.formats.contract import TensorSpec
from stager.workers.checkpoint.layout.layout import contiguous_stride
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CheckpointNotFoundError, UnstageableError
from stager.workers.faults import point


@dataclass(frozen=True, slots=True)
class ExportedWeights:
    """Weights that were exported to a directory: the files, what is in them, and how long the export took.

    Attributes:
        path: the directory.
        nbytes: of all tensors.
        files: names of the files of weights.
        sidecars: names of the files beside them.
        tied: names that are not stored, because they share memory with another one: that one's name.
        left_out: objects among the keys, as a user would write them; files of weights hold tensors only.
        renamed_away: names that ``rename`` left out.
        secs: how long the export took.
    """

    path: str
    nbytes: int
    step: int
    num_tensors: int
    files: tuple[str, ...]
    sidecars: tuple[str, ...]
    tied: dict[str, str]
    left_out: tuple[str, ...]
    renamed_away: tuple[str, ...]
    secs: float


@explained('export_weights("runs/gpt", "gpt-hf", keys="model", strip_prefix="model.")')
def export_weights(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: SupportsIndex | None = None,
    keys: str | Sequence[str] | None = None,
    strip_prefix: str | None = None,
    rename: Rename | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int | str = "5GB",
    sidecars: Sequence[str | os.PathLike[str]] = (),
    max_memory_bytes: int | str = 1 << 30,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ExportedWeights:
    """Write a directory that ``from_pretrained`` of transformers loads, and whoever else reads this layout.

    It has ``model.safetensors``; or several files and ``model.safetensors.index.json``. Of weights that are tied, the first
    name is stored, as transformers does; the result lists the others.

    Args:
        checkpoint: its directory (``.../step-00000100``), or that of the run.
        out: the directory; it appears when it is whole.
        step: which checkpoint of the run; None: the newest. The result has the step.
        keys: export only what matches this pattern, or one of these, as for ``load()``: ``"model"`` is all that is in the
            model. None: all of the checkpoint.
        strip_prefix: names lose it if they begin with it: ``"model."``. None: names stay as they are.
        rename: a mapping of names, without the prefix, to new ones, or a function from one to the other. None as the new
            name leaves a weight out. A mapping may also name what is above weights: ``{"encoder": "body"}``.
        dtype: convert float64, float32, float16 and bfloat16 tensors to this one of them. None: dtypes stay.
        max_shard_bytes: of the tensors of a file, or text such as "200MB". A larger tensor has a file of its own.
        sidecars: files that are copied beside the weights: ``config.json``, those of the tokenizer. The checkpoint's own
            (``save(files=...)``) are copied in any case; one that is named here replaces that of the same name.
        max_memory_bytes: for data in memory, beside the manifest; or text such as "1GiB". A tensor that changes its memory
            layout must fit as a whole, twice.
        force: replace ``out``, if it is an export of weights and has nothing else in it.
        progress: called with the number of bytes just read, from several threads.

    Raises:
        CheckpointNotFoundError, CorruptCheckpointError, StorageError: ``out`` was not changed.
        UnstageableError: safetensors cannot hold a tensor or its name, or a value is too large for ``dtype``; names it.
        MemoryBudgetError: a tensor does not fit ``max_memory_bytes``.
        StateMismatchError: a pattern of ``keys`` matches nothing, no name begins with ``strip_prefix``, ``rename`` has a
            name that no tensor has, or gives two tensors one name, or no tensor is left.
        UsageError: something is in the way of ``out``; or a file of ``sidecars`` is missing; or ``rename`` raised.
    """
    asked = WeightsExport(
        out,
        keys=keys,
        strip_prefix=strip_prefix,
        rename=rename,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        sidecars=sidecars,
        max_memory_bytes=max_memory_bytes,
        force=force,
    )
    export = resolved(asked)
    chosen = chosen_checkpoint(place_path(checkpoint, "checkpoint"), None if step is None else as_step(step))
    return write_weights(chosen, export, progress=progress or (lambda nbytes: None))


def export_saved(checkpoint: str, save_id: str, export: WeightsExport) -> ExportedWeights:
    """Export the checkpoint that a save has committed; in a worker.

    Args:
        checkpoint: its path.
        save_id: of the save.
        export: resolved.

    Raises:
        CheckpointNotFoundError: another checkpoint has the path now.
        Exception: as :func:`export_weights`.
    """
    point("export.begin")
    return write_weights(checkpoint, export, progress=lambda nbytes: None, save_id=save_id)


def write_weights(
    checkpoint: str, export: WeightsExport, *, progress: Callable[[int], None], save_id: str | None = None
) -> ExportedWeights:
    """Make an export, by the steps at the head of this file.

    Args:
        checkpoint: its path.
        export: resolved.
        progress: as of :func:`export_weights`.
        save_id: which save must have made the checkpoint; None: any.

    Raises:
        CheckpointNotFoundError: another save made it, or it was replaced before its files were open.
        Exception: as :func:`export_weights`.
    """
    started = time.monotonic()
    out, budget = os.fspath(export.out), budget_of(export)
    with reading(checkpoint), ExitStack() as opened:
        manifest = read_manifest(checkpoint)
        if save_id not in (None, manifest.header.save_id):
            what = "a later save has replaced the checkpoint, so its weights were not exported"
            raise CheckpointNotFoundError(None, what, checkpoint)
        point("export.manifest")
        with opening(checkpoint, manifest):
            part = part_of(export)
            source = opened.enter_context(closing(Source(checkpoint, manifest, part, budget.chunk_bytes, progress)))
            beside = with_own(checkpoint, manifest, sidecars_of(export.sidecars))
        point("export.opened")
        names = name_weights(source, export.rename, checkpoint)
        weights = _weights(source, names, dtype_named(export.dtype))
        shards = shards_of(weights, shard_bytes_of(export), [one.name for one in beside], MARKER)
        copier = TensorCopier(source, budget.whole_bytes)
        with new_directory(out, force=export.force) as directory:
            write_shards(shards, directory, copier, budget.num_threads)
            _write_the_rest(shards, beside, directory)
            point("export.written")
    return ExportedWeights(
        path=out,
        nbytes=total_nbytes(shards),
        step=manifest.header.step,
        num_tensors=len(names.of),
        files=tuple(shard.name for shard in shards),
        sidecars=tuple(one.name for one in beside),
        tied=names.tied(),
        left_out=source.names_of_objects(),
        renamed_away=names.left_out,
        secs=time.monotonic() - started,
    )


def _weights(source: Source, names: WeightNames, dtype: str | None) -> list[Weight]:
    weights = []
    for number, its_names in names.of.items():
        item = source.items[number]
        stored = dtype_in_file(item.dtype, dtype)
        if not get_format("safetensors").holds(stored):
            raise UnstageableError(
                source.name(number), f"has dtype {stored}, which safetensors cannot store; convert it, or leave it out"
            )
        paths = tuple(source.paths[number])
        weights.append(Weight(number, TensorSpec(paths, its_names, stored, item.shape, contiguous_stride(item.shape))))
    return weights


def _write_the_rest(shards: Sequence[Shard], sidecars: Sequence[Sidecar], directory: str) -> None:
    if len(shards) > 1:
        with storage_errors("write", directory):
            fd = files.open_directory(directory)
            try:
                files.write_atomically(fd, directory, INDEX_NAME, index_of(shards), fsync=True)
            finally:
                os.close(fd)
    for one in sidecars:
        one.copy_to(directory)
