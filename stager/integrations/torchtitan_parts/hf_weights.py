"""Weights in the layout of Hugging Face, as torchtitan finds them: all files of a directory, with or without an index.

torchtitan reads each ``.safetensors`` of the directory and takes the names that its model has, whatever else is there. Where
two files have one name, it takes either. Here an index decides, or it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from stager.config.host import reading_threads
from stager.integrations.torchtitan_parts.targets import in_stored_dtypes
from stager.loading.foreign_path import find, is_in_safetensors
from stager.loading.foreign_restore import restore_foreign
from stager.loading.rank_names import ranks_of_this_job
from stager.loading.renaming import Renaming
from stager.loading.safetensors_reader import INDEX_ENDING, SHARD_BEGINNING, SafetensorsFiles, joined, weight_map
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import UsageError


def load_hf(path: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Load weights by their Hugging Face names, in the dtypes that they have there.

    Args:
        path: of a directory, or of a file.
        weights: what they are loaded into, where the dtype is the same.

    Returns:
        The weights that were loaded.

    Raises:
        UsageError: two files have the same name of a tensor.
        StateMismatchError: a name is missing, or a shape differs.
        Exception: as of :func:`stager.load_checkpoint`.
    """
    source = _source(path, weights.keys())
    items = source.manifest.layout.items
    dtypes = {str(key[0]): dtype_of(items[number].dtype) for key, number in source.manifest.paths()}
    into = in_stored_dtypes(weights, dtypes)
    others, _ = ranks_of_this_job(os.path.realpath(path), into, strict=True)
    restore_foreign(source, into, True, None, Renaming(), others)
    return into


def is_sharded(path: str) -> bool:
    """Tell whether a directory has what each rank saved by itself, which the adapter's own reader puts together."""
    return any(name.startswith(SHARD_BEGINNING) for name in _names(path))


def _source(path: str, wanted: Collection[str]) -> SafetensorsFiles:
    names = _names(path)
    if not names:
        return SafetensorsFiles(find(path).path, reading_threads())
    found = os.path.join(path, names[0])  # for messages, and it lies in the directory
    return SafetensorsFiles(found, reading_threads(), _manifest(path, names, wanted))


def _names(path: str) -> list[str]:
    """List the files of weights in a directory; none, if it is something else."""
    if not os.path.isdir(path):
        return []
    with storage_errors("list", path):
        return sorted(filter(is_in_safetensors, os.listdir(path)))


def _manifest(path: str, names: list[str], wanted: Collection[str]) -> Manifest:
    with storage_errors("list", path):
        indices = sorted(name for name in os.listdir(path) if name.endswith(INDEX_ENDING))
    owners: dict[str, str] = {}
    for index in indices:
        owners |= weight_map(os.path.join(path, index))

    def refuse(name: str, first: str, second: str) -> None:
        if name in wanted:
            raise UsageError(
                f"{path}: {name} is in two files, {first} and {second}, and no index says in which; move one of them away"
            )

    return joined(path, names, owners, refuse)
