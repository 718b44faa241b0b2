"""What lies at a path: a checkpoint, and whose; or what else, in one sentence that says what to name instead."""

from __future__ import annotations

import os
from enum import Enum
from typing import NamedTuple

from stager.loading.file_kinds import refuse_other_kinds
from stager.loading.safetensors_reader import INDEX_ENDING, SHARD_ADVICE, SHARD_BEGINNING, is_safetensors
from stager.workers.checkpoint.directory.choice import runs_inside
from stager.workers.checkpoint.directory.run_directory import checkpoint_names, committed_steps
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.documents.names import is_partial, parse_checkpoint
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError
from stager.workers.wording import first_of

METADATA_NAME = ".metadata"
_DATA_ENDING = ".distcp"
_SAFETENSORS = ".safetensors"
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
_SHOWN_NAMES = 5


class Origin(Enum):
    """Who wrote a checkpoint."""

    STAGER = "stager"
    DCP = "torch.distributed.checkpoint.save"
    TORCH_SAVE = "torch.save"
    SAFETENSORS = "safetensors"


class Found(NamedTuple):
    """A checkpoint: who wrote it, and its directory or file; of safetensors in several files, their index."""

    origin: Origin
    path: str


def find(path: str | os.PathLike[str]) -> Found:
    """Tell who wrote the checkpoint, from the names of its files or the first bytes of the file.

    Raises:
        CheckpointNotFoundError: there is none; says what there is, and which path to name.
        UsageError: a file of another kind; says of which.
        CorruptCheckpointError: a file that is empty, cut short, or of no known kind.
        StorageError
    """
    path = os.fspath(path)
    if not storage_of(path).guarantees.foreign_files:
        return _find_own(path)
    real = os.path.realpath(path)
    if os.path.isdir(real):
        return _find_in(real)
    if not os.path.lexists(real):
        raise _not_found(real, _of_nothing(real))
    directory = os.path.realpath(os.path.dirname(path) or ".")
    name = os.path.basename(path)
    if name.endswith(INDEX_ENDING):  # it may be a link; the files that it names are beside the link
        return Found(Origin.SAFETENSORS, os.path.join(directory, name))
    if (name.endswith(_DATA_ENDING) or name in (MANIFEST_NAME, METADATA_NAME)) and _is_checkpoint(directory):
        raise _not_found(real, f"is one file of the checkpoint {directory}; name that directory")
    if is_safetensors(real):
        return Found(Origin.SAFETENSORS, real)
    refuse_other_kinds(real)
    return Found(Origin.TORCH_SAVE, real)


def _find_own(path: str) -> Found:
    """Tell what is at a URL, where only stager writes."""
    if storage_of(path).has_manifest(path):
        return Found(Origin.STAGER, path)
    if checkpoints := checkpoint_names(path):
        raise _not_found(path, _of_run(path, checkpoints))
    directory = os.path.dirname(path)
    steps = committed_steps(directory)
    there = f"; {directory} has the checkpoints of {_steps(steps)}" if steps else ""
    raise _not_found(path, f"does not exist, or is not committed{there}")


def is_in_safetensors(name: str) -> bool:
    """Whether a file has a name of safetensors."""
    return name.endswith(_SAFETENSORS)


def not_ours(path: str) -> str | None:
    """Say why there is no checkpoint of stager at ``path``, an absolute one, and which path to name; None: there may be one.

    Raises:
        StorageError
    """
    name = os.path.basename(path)
    storage = storage_of(path)
    if storage.has_manifest(path) or (
        parse_checkpoint(name) is not None and storage.has_directory(path)  # it has lost its manifest
    ):
        return None
    try:
        found = find(path)
    except CheckpointNotFoundError as error:
        return error.message
    except (CorruptCheckpointError, UsageError):
        return "is no checkpoint of stager, which is a directory with a manifest.json; name one, such as step-00000100"
    return (
        f"cannot be verified: it was written by {found.origin.value}, which stores no hashes. This says nothing about "
        "damage; load_checkpoint() reads such checkpoints"
    )


def _find_in(directory: str) -> Found:
    if os.path.lexists(os.path.join(directory, MANIFEST_NAME)):
        return Found(Origin.STAGER, directory)
    if os.path.lexists(os.path.join(directory, METADATA_NAME)):
        return Found(Origin.DCP, directory)
    with storage_errors("list", directory):
        names = sorted(os.listdir(directory))
    indices = [name for name in names if name.endswith(INDEX_ENDING)]
    weights = list(filter(is_in_safetensors, names))
    if len(indices) == 1 and weights:
        return Found(Origin.SAFETENSORS, os.path.join(directory, indices[0]))
    if len(weights) == 1 and not indices:  # a shard alone is refused when its header is read
        return Found(Origin.SAFETENSORS, os.path.realpath(os.path.join(directory, weights[0])))
    raise _not_found(directory, _of_directory(directory, names, indices or weights))


def _is_checkpoint(directory: str) -> bool:
    return any(os.path.lexists(os.path.join(directory, name)) for name in (MANIFEST_NAME, METADATA_NAME))


def _not_found(path: str, what: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(None, f"is no checkpoint: it {what}", path)


def _of_nothing(path: str) -> str:
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        return f"does not exist, nor does the directory {parent}"
    steps = committed_steps(parent)
    return "does not exist" + (f"; {parent} has the checkpoints of {_steps(steps)}" if steps else "")


def _of_directory(directory: str, names: list[str], weights: list[str]) -> str:
    """Say what is in a directory that is no checkpoint, and what to do.

    Args:
        weights: which of the ``names`` are of safetensors.
    """
    if is_partial(os.path.basename(directory)):
        return (
            "is a save that was never committed, or is still being written; "
            f"`stager recover {os.path.dirname(directory)}` commits it if all of it is there"
        )
    if checkpoints := checkpoint_names(directory):
        return _of_run(directory, checkpoints)
    if any(name.startswith(SHARD_BEGINNING) for name in weights):
        return f"has files ({_shown(weights)}) each of which {SHARD_ADVICE}"
    if weights:
        return f"has {len(weights)} files of safetensors, and no index of them all: {_shown(weights)}; name one of them"
    return _of_others(directory, names)


def _of_run(directory: str, checkpoints: dict[int, str]) -> str:
    steps = list(checkpoints)
    newest = os.path.join(directory, checkpoints[steps[0]])
    return (
        f"is the directory of a run, with the checkpoints of {_steps(steps)}; name one of them, {newest} for example "
        f"(Checkpointer({directory!r}, read_only=True).load() loads the newest valid one)"
    )


def _of_others(directory: str, names: list[str]) -> str:
    if any(name.endswith(_DATA_ENDING) for name in names):
        return (
            "has data of dcp.save (.distcp) and no .metadata, which is written last: the save did not finish, or the file "
            "was not copied, as names that begin with a dot often are not"
        )
    if inside := [name for name in names if _is_checkpoint(os.path.join(directory, name))]:
        return f"has checkpoints in it: {_shown(inside)}; name one of them"
    if runs := runs_inside(directory):
        return f"is a directory without checkpoints{runs}"
    without = "is a directory without manifest.json, .metadata or safetensors"
    if files := [name for name in names if name.endswith(TORCH_ENDINGS)]:
        return f"{without}; name one of its files: {_shown(files)}"
    return f"{without}; it has {_shown(names)}" if names else "is an empty directory"


def _shown(names: list[str]) -> str:
    return first_of(names, _SHOWN_NAMES)


def _steps(steps: list[int]) -> str:
    """Newest first: those that people ask for."""
    many = "steps" if len(steps) > 1 else "step"
    more = f" and {len(steps) - _SHOWN_NAMES} older ones" if len(steps) > _SHOWN_NAMES else ""
    return f"{many} {', '.join(map(str, steps[:_SHOWN_NAMES]))}{more}"
