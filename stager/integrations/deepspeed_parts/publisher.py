"""Publishing a tag: all files of all ranks, in one step, and then ``latest``.

NOTE [ One commit per tag ]
    ranks    training thread   save_checkpoint(): a snapshot of each file; hand the save over to the publisher
             workers           write each file in .stager/rank-N, as a checkpoint of its own: synced, hashed
             publisher         1. waits until this rank's files are there, and reports their names, or the error
    rank 0   publisher         2. waits for the reports of all ranks
                               3. moves the files into .stager/new-..., and renames that to the tag
                               4. writes "latest", by a rename, too
                               5. says what has become of it
    others   publisher         6. wait for that
  A kill before 3 leaves the tag as it was: absent, or the older checkpoint of this name. A kill between 3 and 4 leaves a
  whole tag that "latest" does not name yet. The publishers talk through files and never through the process group, which
  belongs to the training thread. Each has one thread, so saves are published in the order in which they were begun.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from stager.integrations.deepspeed_parts.area import (
    MANIFESTS,
    Area,
    read_message,
    replace_tag,
    take_out,
    write_message,
)
from stager.integrations.deepspeed_parts.tag_names import LATEST
from stager.saving.save import SaveHandle
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import InconsistentRanksError, RankFailedError
from stager.workers.faults import point

logger = logging.getLogger("stager")

_POLL_SECS = 0.02


@dataclass(frozen=True)
class TagSave:
    """A save of one rank that is written.

    Attributes:
        number: counts the saves of the run; the same on all ranks.
        handles: by the file's path, from ``save_dir``: in the tag, or, of ``save_16bit_model()``, wherever that is to write.
        is_tag: the files are those of a tag, which they make when all of them are there.
        is_latest: ``latest`` is to name it.
    """

    area: Area
    number: int
    tag: str
    handles: Mapping[str, SaveHandle]
    is_tag: bool
    is_latest: bool


class Publisher:
    """Publishes saves in a thread of its own, one after the other.

    Args:
        timeout_secs: how long a rank waits for the others.
        fsync: sync what is renamed.
    """

    def __init__(self, timeout_secs: float, fsync: bool) -> None:
        self._timeout_secs = timeout_secs
        self._fsync = fsync
        self._is_given_up = threading.Event()
        self._given_up: frozenset[int] = frozenset()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stager-deepspeed")

    def publish(self, save: TagSave) -> Future[None]:
        """Publish a save when it is written. The Future ends when it is published, on all ranks with the same outcome."""
        return self._thread.submit(self._end, save)

    def give_up(self, numbers: frozenset[int]) -> None:
        """Wait for other ranks no longer in these saves: they have failed on some rank, which perhaps cannot report it."""
        self._given_up |= numbers

    def give_up_all(self) -> None:
        """Wait for no other rank any more."""
        self._is_given_up.set()

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()

    def _end(self, save: TagSave) -> None:
        error = _first_error(save)
        try:
            failure = self._agreed(save, error)
        except Exception as raised:  # noqa: BLE001  # the thread's edge: the caller gets it
            failure = raised
        if (problem := error or failure) is not None:
            for path in save.handles:
                files.remove(save.area.written(save.area.rank, save.number, os.path.basename(path)))
            raise problem

    def _agreed(self, save: TagSave, error: BaseException | None) -> Exception | None:
        area = save.area
        said: dict[str, Any] = {"run": area.run, "number": save.number, "files": list(save.handles), "error": None}
        if error is not None:
            said["error"] = f"{type(error).__name__}: {error}"
        point("deepspeed.written")
        write_message(area.report(area.rank), said)
        return self._decide(save) if area.rank == 0 else self._await_outcome(save)

    # -- rank 0 -------------------------------------------------------------------------------------------------

    def _decide(self, save: TagSave) -> Exception | None:
        failure: Exception | None = None
        try:
            self._put_in_place(save, self._reports(save))
        except Exception as error:  # noqa: BLE001  # the thread's edge: the caller gets it, and all ranks
            failure = error
            with suppress(OSError):  # the first error is the one to tell
                files.remove(save.area.new(save.number))
        failed = failure.ranks if isinstance(failure, RankFailedError) else (0,)
        text = str(failure) if isinstance(failure, RankFailedError) else f"rank 0: {type(failure).__name__}: {failure}"
        said = {"error": None if failure is None else text, "ranks": list(failed)}
        write_message(save.area.outcome(), {"run": save.area.run, "number": save.number, **said})
        return failure

    def _reports(self, save: TagSave) -> dict[str, int]:
        """Wait for all ranks; return which rank has which file.

        Raises:
            RankFailedError: a rank could not write its files, or has not reported in time.
            InconsistentRanksError: two ranks have a file of the same name.
        """
        area = save.area
        ranks: dict[str, int] = {}
        for rank in range(area.num_ranks):
            said = self._wait_for(partial(read_message, area.report(rank), area.run, save.number), save.number)
            if said is None or said["error"] is not None:
                problem = f"has not written its files {self._until(save)}" if said is None else said["error"]
                raise RankFailedError(f"rank {rank} {problem}; {save.tag} is not published", (rank,))
            for name in said["files"]:
                if name in ranks:
                    raise InconsistentRanksError(
                        f"rank {ranks[name]} and rank {rank} have both saved {name}; only one of them may"
                    )
                ranks[name] = rank
        return ranks

    def _put_in_place(self, save: TagSave, ranks: Mapping[str, int]) -> None:
        if not save.is_tag:
            self._put_beside(save, ranks)
        elif ranks:
            self._put_in_tag(save, ranks)
        point("deepspeed.published")
        if save.is_latest:
            self._write_latest(save.area.save_dir, save.tag)

    def _put_beside(self, save: TagSave, ranks: Mapping[str, int]) -> None:
        area = save.area
        for path, rank in ranks.items():
            final = os.path.normpath(os.path.join(area.save_dir, path))
            with storage_errors("write", final):
                take_out(area.written(rank, save.number, os.path.basename(path)), final, None)
                self._sync(os.path.dirname(final))

    def _put_in_tag(self, save: TagSave, ranks: Mapping[str, int]) -> None:
        area, final, new = save.area, os.path.join(save.area.save_dir, save.tag), save.area.new(save.number)
        manifests = os.path.join(new, MANIFESTS)
        with storage_errors("commit", final):
            os.makedirs(manifests)
            for path, rank in ranks.items():
                name = os.path.basename(path)
                take_out(area.written(rank, save.number, name), os.path.join(new, name), manifests)
            point("deepspeed.collected")
            self._sync(manifests, new)
            replace_tag(area, save.tag, new)
            self._sync(os.path.dirname(final))

    def _write_latest(self, save_dir: str, tag: str) -> None:
        directory_fd = files.open_directory(save_dir)
        try:
            files.write_atomically(directory_fd, save_dir, LATEST, tag.encode(), self._fsync)
            if self._fsync:
                os.fsync(directory_fd)
        finally:
            os.close(directory_fd)

    def _sync(self, *directories: str) -> None:
        if self._fsync:
            for directory in directories:
                files.sync_directory(directory)

    # -- the others ---------------------------------------------------------------------------------------------

    def _await_outcome(self, save: TagSave) -> Exception | None:
        area = save.area
        said = self._wait_for(partial(read_message, area.outcome(), area.run, save.number), save.number)
        if said is None:
            return RankFailedError(f"rank 0 has not published {save.tag} {self._until(save)}; look at its log", (0,))
        return None if said["error"] is None else RankFailedError(said["error"], tuple(said["ranks"]))

    def _wait_for(self, read: Callable[[], dict[str, Any] | None], number: int) -> dict[str, Any] | None:
        deadline = time.monotonic() + self._timeout_secs
        while (said := read()) is None and time.monotonic() < deadline:
            if self._is_given_up.wait(_POLL_SECS) or number in self._given_up:
                return None
        return said

    def _until(self, save: TagSave) -> str:
        is_told = self._is_given_up.is_set() or save.number in self._given_up
        return "when the save was given up" if is_told else f"within {self._timeout_secs:g} s"


def _first_error(save: TagSave) -> BaseException | None:
    """Wait until a rank's files are there. Returns the first error, if one is not."""
    errors = [handle.upload_completion.exception() for handle in save.handles.values()]
    return next((error for error in errors if error is not None), None)
