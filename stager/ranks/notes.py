"""What the ranks tell each other of a save, on the notice rendezvous.

saves/<save_id>               how it ended: what was committed, or why it failed, and which ranks are to blame
saves/<save_id>/failures      how many had a reason; the first one's is posted
saves/<save_id>/helpers       how many ranks but rank 0 have looked and found every part, and no commit
saves/<save_id>/every-part    was there at somebody's deadline: it only has to be committed
newest                        the step of the last checkpoint that a rank knows of
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from stager.ranks.agreement import meeting
from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, checkpoint_name
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import RankFailedError, StorageError

_MAX_HELPERS = 3  # where locks do not reach from host to host, each commits anew

Note = Mapping[str, Any]


class Notes:
    """Nothing is posted while the store cannot be reached: the others see the directory.

    Args:
        group: with a rendezvous.
    """

    def __init__(self, group: RankGroup) -> None:
        assert group.rendezvous is not None
        self._rendezvous: Rendezvous = group.rendezvous
        self._group = group

    def post_committed(self, committed: Committed) -> None:
        """With all that there is to know: the checkpoint may be replaced or removed before another rank has looked."""
        info = committed.info
        with suppress(RankFailedError):
            self._rendezvous.post(_end(info.save_id), json.dumps(asdict(committed)).encode())
            self._rendezvous.post("newest", str(info.step).encode())

    def post_found(self, committed: Committed) -> None:
        """What nobody has posted yet; or it was posted meanwhile, and the next one, too."""
        with suppress(RankFailedError):
            if self._rendezvous.read(_end(committed.info.save_id)) is None:
                self.post_committed(committed)

    def post_failed(self, save_id: str, error: BaseException) -> None:
        """On this rank."""
        self.post_failure(
            save_id, f"failed on rank {self._group.rank}: {type(error).__name__}: {error}", [self._group.rank]
        )

    def post_failure(self, save_id: str, why: str, ranks: Sequence[int], *, is_unfinished: bool = False) -> None:
        """Unless another rank was first: its reason is the reason.

        Args:
            is_unfinished: nothing went wrong, but that these ranks' parts are missing.
        """
        with suppress(RankFailedError):
            self._group.cancel_barrier(meeting(save_id), f"the save {why}", ranks)
            if self._rendezvous.add(f"{_end(save_id)}/failures") == 1:
                note = {"ranks": list(ranks), "error": why, **({"unfinished": True} if is_unfinished else {})}
                self._rendezvous.post(_end(save_id), json.dumps(note).encode())

    def post_every_part(self, save_id: str) -> None:
        with suppress(RankFailedError):
            self._rendezvous.post(_every_part(save_id), b"")

    def every_part_is_written(self, save_id: str) -> bool:
        """Whether another rank has said so."""
        with suppress(RankFailedError):
            return self._rendezvous.read(_every_part(save_id)) is not None
        return False

    def claims_commit(self, save_id: str) -> bool:
        """Whether this rank may help to commit: a few do, so that some live."""
        with suppress(RankFailedError):
            return self._rendezvous.add(f"{_end(save_id)}/helpers") <= _MAX_HELPERS
        return False

    def read(self, save_id: str) -> Note | None:
        """How a save ended; None: nobody has said that it has.

        Raises:
            RankFailedError: the store cannot be reached.
        """
        note = self._rendezvous.read(_end(save_id))
        return None if note is None else dict(json.loads(note))

    def reason(self, spec: SaveSpec, error: BaseException) -> BaseException:
        """Why this rank's part failed: because another rank had given the save up, and has removed it, perhaps."""
        if isinstance(error, StorageError) and error.errno == errno.ENOENT:
            with suppress(RankFailedError):
                note = self.read(spec.save_id)
                end = None if note is None else end_by(note, spec)
                if isinstance(end, RankFailedError):
                    return end
        return error


def end_by(note: Note, spec: SaveSpec) -> Committed | RankFailedError:
    """What a note says of the save, as this rank sees it."""
    if "error" in note:
        return RankFailedError(f"the save of step {spec.step} {note['error']}", tuple(note["ranks"]))
    path = os.path.join(spec.directory, checkpoint_name(spec.step))  # as this host sees it
    info = CheckpointInfo(**{**note["info"], "path": path})
    return Committed(info, note["started"], note["ended"], note["pid"])


def _end(save_id: str) -> str:
    return f"saves/{save_id}"


def _every_part(save_id: str) -> str:
    return f"{_end(save_id)}/every-part"
