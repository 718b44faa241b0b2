"""The methods of a DeepSpeed engine that stager stands around, because they do more than its checkpoint engine sees."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from stager.integrations.deepspeed_parts.tag_names import LATEST, LATEST_UNIVERSAL
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.checkpoint.storage.posix.files import storage_errors


class Ours(Protocol):
    """What the methods ask of the checkpoint engine."""

    def expect_save(self, is_latest: bool) -> None:
        """Take note that a save begins, and whether ``latest`` is to name it."""

    def settle(self, load_dir: str) -> None:
        """Wait on all ranks until no save is in flight."""

    def checked_together(self, directory: str, is_needed: Callable[[str], bool]) -> AbstractContextManager[None]:
        """Compare the files of a tag with their hashes, on all ranks."""

    def erring(self) -> AbstractContextManager[None]:
        """Keep an error of this rank until all ranks raise it."""


def stand_around(engine: Any, ours: Ours) -> None:
    """Put what stager does before and after them around the methods of a DeepSpeed engine."""
    around: dict[str, Callable[..., Any]] = {
        "save_checkpoint": _saving,
        "load_checkpoint": _loading,
        "_copy_recovery_script": _copying,
    }
    for name, wrap in around.items():
        vars(engine).pop(name, None)  # of an engine that is closed
        if hasattr(engine, name):
            setattr(engine, name, wrap(engine, ours))


def _saving(engine: Any, ours: Ours) -> Callable[..., Any]:
    """Let the publisher write ``latest``: DeepSpeed writes it when it has called ``commit()``, which does not wait."""
    save_checkpoint = engine.save_checkpoint
    signature = inspect.signature(save_checkpoint)

    @functools.wraps(save_checkpoint)
    def saving(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        ours.expect_save(bool(given.arguments["save_latest"]))
        given.arguments["save_latest"] = False
        return save_checkpoint(*given.args, **given.kwargs)

    return saving


def _loading(engine: Any, ours: Ours) -> Callable[..., Any]:
    """Let every rank read the same ``latest``, and no rank a tag that is damaged for another one."""
    load_checkpoint = engine.load_checkpoint
    signature = inspect.signature(load_checkpoint)

    @functools.wraps(load_checkpoint)
    def loading(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        wanted = given.arguments
        load_dir = local_path(wanted["load_dir"], "load_dir")
        ours.settle(load_dir)
        pointer = LATEST_UNIVERSAL if engine.load_universal_checkpoint() else LATEST
        tag = _read_tag(os.path.join(load_dir, pointer)) if wanted["tag"] is None else str(wanted["tag"])
        has_optimizer = wanted["load_optimizer_states"] and not wanted["load_module_only"]
        directory = os.path.normpath(os.path.join(load_dir, tag))
        with ours.checked_together(directory, lambda name: has_optimizer or "optim_states" not in name):
            return load_checkpoint(*args, **kwargs)

    return loading


def _copying(engine: Any, ours: Ours) -> Callable[..., Any]:
    """Let all ranks raise it when DeepSpeed, on one rank alone, cannot copy its scripts to the tags."""
    copy = engine._copy_recovery_script

    @functools.wraps(copy)
    def copying(save_dir: str) -> None:
        with ours.erring(), storage_errors("write", save_dir):
            copy(save_dir)

    return copying


def _read_tag(pointer: str) -> str:
    """Return the tag that a file names; nothing if there is no such file, which DeepSpeed says itself."""
    try:
        with open(pointer) as file:
            return file.read().strip()
    except OSError:
        return ""
