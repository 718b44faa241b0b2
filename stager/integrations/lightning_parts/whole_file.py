"""``load_from_checkpoint()`` of a checkpoint that is a directory."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from stager import CheckpointNotFoundError, load_checkpoint, load_config
from stager.integrations.lightning_parts.earlier_run import finish_earlier_run
from stager.integrations.lightning_parts.writer import absolute, wait_for_saves_to
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest, read_manifest

M = TypeVar("M")

META = "meta.pt"  # as Lightning calls the file beside the shards
_LEFT_OUT = "optimizer_states"


def load_from_checkpoint(model_class: type[M], path: str | os.PathLike[str], **options: Any) -> M:
    """Do what ``model_class.load_from_checkpoint(path)`` does, also for a checkpoint of stager's.

    Lightning reads one file there, and does not ask the CheckpointIO. So the checkpoint, without the states of optimizers,
    is read by stager and given to Lightning as a file in memory. A save to ``path`` that is in flight is waited for.

    Args:
        model_class: a ``LightningModule`` or a ``LightningDataModule``.
        path: of the checkpoint, stager's or Lightning's; of one rank or sharded.
        options: what ``load_from_checkpoint()`` takes beside the path. With ``weights_only=False``, objects that are not
            plain data are unpickled, which runs code from the checkpoint.

    Raises:
        CheckpointNotFoundError: there is no checkpoint at ``path``.
        Exception: as :func:`stager.load_checkpoint`, and as Lightning's ``load_from_checkpoint()``.
    """
    found = absolute(path)
    wait_for_saves_to(found)
    if not os.path.exists(found):  # it may be saved by another rank just now, or by workers of a killed run
        finish_earlier_run(os.path.dirname(found), load_config().persistence.lock_timeout_secs)
    if not os.path.exists(found):
        raise CheckpointNotFoundError(None, "there is no checkpoint", found)
    if not os.path.isdir(found):
        return _theirs(model_class, path, options)
    state = _without_optimizers(found, allow_pickle=options.get("weights_only") is False)
    file = io.BytesIO()
    torch.save(state, file)
    del state
    file.seek(0)
    # What needs a permission was refused above.
    return _theirs(model_class, file, {**options, "weights_only": False})


def _theirs(model_class: type[M], source: str | os.PathLike[str] | io.BytesIO, options: Mapping[str, Any]) -> M:
    lightning_class: Any = model_class
    loaded: M = lightning_class.load_from_checkpoint(source, **options)
    return loaded


def _without_optimizers(path: str, *, allow_pickle: bool) -> dict[str, Any]:
    names = {str(key_path[0]) for key_path, _ in read_manifest(path).paths()} if has_own_manifest(path) else set()
    wanted = [name for name in sorted(names) if name != _LEFT_OUT and not name.startswith("optimizer_")]
    loaded = load_checkpoint(path, keys=wanted or None, allow_pickle=allow_pickle)
    state = dict(loaded.state)
    if META in loaded.files:
        state |= torch.load(io.BytesIO(loaded.files[META]), weights_only=not allow_pickle)
    return state
