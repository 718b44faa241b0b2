"""Rotation: ``save_total_limit``, applied when a save is committed and not when it is begun.

The Trainer's own looks at the directory in the training thread. There, a save in flight is not to be seen yet, so the limit
would be exceeded, and nothing would look again after the last commit.

A training that has gone back to an earlier step, or begins anew in the same directory, saves to the paths of older
checkpoints. ``PathCheckpointer.delete()`` cancels a save to its path, so a path that is about to be saved is not removed
any more:
    1. The training thread says so before it begins the save (``before()``). Beginning it may take long: it waits for memory.
    2. It waits there if the path is being removed just now.
    3. The rotation thread looks again right before each removal.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection
from concurrent.futures import wait
from dataclasses import dataclass
from queue import SimpleQueue

from transformers.trainer import TRAINER_STATE_NAME

from stager import SaveHandle
from stager.telemetry.report import SaveState
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.errors import CheckpointNotFoundError, StagerError

logger = logging.getLogger("stager")

_NAME = re.compile(r"checkpoint-([0-9]+)")  # what get_last_checkpoint() takes for a checkpoint


@dataclass(frozen=True, slots=True)
class RotationRule:
    """Which checkpoints stay.

    Attributes:
        limit: so many, and the newest and the best in any case.
        best: path of the best checkpoint, absolute; None: there is none.
    """

    limit: int
    best: str | None


@dataclass(frozen=True, slots=True)
class _Awaited:
    """A save after whose commit a rule is applied to the directory that it lies in."""

    handle: SaveHandle
    path: str
    rule: RotationRule


class Rotation:
    """Removes old checkpoints after commits, one save after the other, in a thread that ends with :meth:`close`.

    Args:
        delete: removes a checkpoint of stager's (``PathCheckpointer.delete``).
    """

    def __init__(self, delete: Callable[[str], object]) -> None:
        self._delete = delete
        self._committed: dict[str, int] = {}  # paths, with their places in the order of commits
        self._changed = threading.Condition()
        self._pending: list[str] = []  # paths of saves whose turn has not come, in the order of the saves
        self._removing: str | None = None
        self._awaited: SimpleQueue[_Awaited | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._gives_up = threading.Event()

    def before(self, path: str) -> None:
        """Do not remove what is at ``path``: it is about to be saved. Waits for a removal of it that has begun."""
        with self._changed:
            self._pending.append(path)
            while self._removing == path:
                self._changed.wait()

    def after(self, handle: SaveHandle, path: str, rule: RotationRule) -> None:
        """Apply a rule when a save to ``path`` is committed, of which :meth:`before` was told."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stager rotation", daemon=True)
            self._thread.start()
        self._awaited.put(_Awaited(handle, path, rule))

    def give_up(self) -> None:
        """Begin no further removal. What is left over goes after the next commit, of whichever training."""
        self._gives_up.set()

    def close(self) -> None:
        """Wait until every save has ended and its rule is applied."""
        if self._thread is not None:
            self._awaited.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (awaited := self._awaited.get()) is not None:
            wait([awaited.handle.upload_completion])  # does not count as reading its error
            with self._changed:
                self._pending.remove(awaited.path)
                pending = list(self._pending)
            if awaited.handle.state is not SaveState.COMMITTED:
                continue
            self._committed.pop(awaited.path, None)  # one that is saved again is the newest
            self._committed[awaited.path] = 1 + max(self._committed.values(), default=-1)
            # This thread may be late: later saves may be committed already. They are newer than all that is known here, so
            # they neither count nor go before their turn.
            for path in surplus(os.path.dirname(awaited.path), awaited.rule, self._committed, pending):
                self._remove(path)

    def _remove(self, path: str) -> None:
        with self._changed:
            if self._gives_up.is_set() or path in self._pending:
                return
            self._removing = path
        try:
            self._remove_now(path)
        finally:
            with self._changed:
                self._removing = None
                self._changed.notify_all()

    def _remove_now(self, path: str) -> None:
        logger.info("removing %s, because of save_total_limit", path)
        try:
            if has_own_manifest(path):
                self._delete(path)
            else:
                shutil.rmtree(path)
        except CheckpointNotFoundError:
            pass  # somebody else has removed it
        except (StagerError, OSError) as error:
            logger.warning("%s was not removed, and will be after the next save: %s", path, error)


def surplus(directory: str, rule: RotationRule, committed: dict[str, int], pending: Collection[str] = ()) -> list[str]:
    """Return the checkpoints that have to go, oldest first.

    Args:
        directory: in which they lie.
        committed: the paths of those that this training has committed, with their places in the order of commits. They are
            newer than all others, whatever their numbers: a training may have gone back to an earlier step.
        pending: paths of later saves, whether they are committed or not. They do not count, and stay.
    """

    def age(path: str) -> tuple[int, int]:
        match = _NAME.fullmatch(os.path.basename(path))
        assert match is not None
        return committed.get(path, -1), int(match[1])

    left_alone = set(pending)
    found = sorted((path for path in checkpoints_in(directory) if path not in left_alone), key=age)
    protected = set(found[-1:])
    if rule.best is not None and os.path.realpath(os.path.dirname(rule.best)) == os.path.realpath(directory):
        protected.add(os.path.join(directory, os.path.basename(rule.best)))
    num_excess = max(len(found) - max(rule.limit, len(protected)), 0)
    return [path for path in found if path not in protected][:num_excess]


def checkpoints_in(directory: str) -> list[str]:
    """Return the paths of the committed checkpoints, stager's and the Trainer's own: both have a ``trainer_state.json``."""
    return [
        entry.path
        for entry in os.scandir(directory)
        if _NAME.fullmatch(entry.name) and os.path.isfile(os.path.join(entry.path, TRAINER_STATE_NAME))
    ]
