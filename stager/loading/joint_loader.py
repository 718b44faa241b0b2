"""Loading on all ranks: one checkpoint for all of them, whatever each sees of the file system at that moment.

rank 0 says which checkpoint -> every rank loads it -> all meet and see how the others fared
damaged on any rank: it is restored from replicas, if there are any, or rank 0 says the one before it, and so on; failed for
another reason: every rank raises
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress

from stager.loading.loaded import Loaded
from stager.loading.loader import Loader
from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, checkpoint_name
from stager.workers.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RankFailedError,
    StagerError,
)

_POLL_SECS = 0.02
_VISIBLE_SECS = 60.0  # for so long NFS may keep a directory's attributes

Load = Callable[[int], Loaded | None]


class LoadTogether:
    """
    Args:
        group: with a rendezvous.
        directory: of the run, absolute.
        loader: of this rank.

    Attributes:
        restore: writes the checkpoint of a step that is damaged, or a newer one, from replicas; whether it did. Every rank
            calls it. None: there are none.
    """

    def __init__(self, group: RankGroup, directory: str, loader: Loader) -> None:
        assert group.rendezvous is not None
        self._group = group
        self._rendezvous: Rendezvous = group.rendezvous
        self._directory = directory
        self._loader = loader
        self._rounds = 0
        self._awaited: set[int] = set()
        self._restored: set[int] = set()
        self.restore: Callable[[int], bool] | None = None

    def load(self, step: int | None, load: Load) -> Loaded | None:
        """Every rank calls it.

        Args:
            step: which checkpoint; None: the newest that is valid on every rank.
            load: loads the checkpoint of a step on this rank.

        Raises:
            RankFailedError: it failed on another rank, or a rank did not come.
            CorruptCheckpointError, CheckpointNotFoundError: ``step`` was given, and is damaged or not there.
            StagerError: whatever ``load`` raised here.
        """
        below: int | None = None
        damaged: StagerError | None = None
        while True:
            self._rounds += 1
            head = f"load/{self._rounds}"
            chosen = self._choose(head, below) if step is None else step
            is_there = step is None or self._is_there(head, step)
            if chosen is None:
                if damaged is not None:
                    raise damaged  # nothing is left, and what it was loaded into may be partly overwritten
                return None
            loaded: Loaded | None = None
            error: BaseException | None = None
            try:
                if is_there:
                    self._await_visible(chosen)
                loaded = load(chosen)
            except BaseException as problem:
                error = problem
                is_damaged = isinstance(problem, (CorruptCheckpointError, CheckpointNotFoundError))
                self._post(head, "damaged" if is_damaged else "failed", problem)
                if not isinstance(problem, Exception):
                    self._group.cancel_barrier(
                        head, f"interrupted on rank {self._group.rank}: {problem!r}", [self._group.rank]
                    )
                    raise
            self._group.barrier(head, f"loading the checkpoint of step {chosen}")
            failed, hurt = self._read(f"{head}/failed"), self._read(f"{head}/damaged")
            if failed is None and hurt is None:
                return loaded
            if error is None:
                note = failed or hurt
                assert note is not None
                error = RankFailedError(
                    f"the checkpoint of step {chosen} was not loaded on rank {note['rank']}: {note['error']}",
                    (int(str(note["rank"])),),
                )
            if failed is not None or step is not None:
                raise error
            assert isinstance(error, StagerError)
            damaged, below = error, None if self._restores(chosen) else chosen

    def _restores(self, step: int) -> bool:
        """Once for each step: what is damaged again then is no replica's to mend."""
        if self.restore is None or step in self._restored:
            return False
        self._restored.add(step)
        return self.restore(step)

    def latest(self, find: Callable[[], CheckpointInfo | None]) -> CheckpointInfo | None:
        """What ``find`` finds, once it sees every commit that any rank knew of when this was called."""
        with suppress(RankFailedError):  # without the rendezvous: what this rank sees
            note = self._rendezvous.read("newest")
            if note is not None:
                self._await_visible(int(note))
        return find()

    def _choose(self, head: str, below: int | None) -> int | None:
        if self._group.is_coordinator:
            try:
                found = self._loader.newest(below)
            except BaseException as error:
                self._rendezvous.post(f"{head}/step", json.dumps(f"{type(error).__name__}: {error}").encode())
                raise
            self._rendezvous.post(f"{head}/step", json.dumps(None if found is None else found.step).encode())
            return None if found is None else found.step
        note = self._rendezvous.wait(f"{head}/step", self._group.timeout_secs)
        if note is None:
            raise RankFailedError(
                f"rank 0 did not say which checkpoint to load within {self._group.timeout_secs:g} s; every rank has to call "
                "load()",
                (0,),
            )
        step = json.loads(note)
        if isinstance(step, str):
            raise RankFailedError(f"rank 0 found no checkpoint to load: {step}", (0,))
        return int(step) if step is not None else None

    def _is_there(self, head: str, step: int) -> bool:
        """Whether rank 0 sees the checkpoint of a step; or it is the newest of this run, which rank 0 may not see yet."""
        if self._group.is_coordinator:
            is_there = self._rendezvous.read("newest") == str(step).encode() or self._sees(step)
            self._rendezvous.post(f"{head}/is-there", json.dumps(is_there).encode())
            return is_there
        note = self._rendezvous.wait(f"{head}/is-there", self._group.timeout_secs)
        return note is not None and bool(json.loads(note))

    def _await_visible(self, step: int) -> None:
        """A network file system may show it to this host a little later; then it is not missing yet. But what does not come,
        or was there before, has been removed."""
        deadline = time.monotonic() + min(_VISIBLE_SECS, self._group.timeout_secs)
        while not self._sees(step) and step not in self._awaited and time.monotonic() < deadline:
            time.sleep(_POLL_SECS)
        self._awaited.add(step)

    def _sees(self, step: int) -> bool:
        return os.path.lexists(os.path.join(self._directory, checkpoint_name(step), MANIFEST_NAME))

    def _post(self, head: str, how: str, error: BaseException) -> None:
        note = {"rank": self._group.rank, "error": f"{type(error).__name__}: {error}"}
        if self._rendezvous.add(f"{head}/{how}/count") == 1:
            self._rendezvous.post(f"{head}/{how}", json.dumps(note).encode())

    def _read(self, key: str) -> dict[str, object] | None:
        if self._rendezvous.add(f"{key}/count", 0) == 0:
            return None
        note = self._rendezvous.wait(key, self._group.timeout_secs)
        return None if note is None else dict(json.loads(note))
