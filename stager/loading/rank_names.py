"""The names that the ranks of a job have, where each rank calls ``load_checkpoint()`` by itself.

The stages of a pipeline save names that no other rank has. For a rank that loads its own stage, those of the others are not
unexpected. ``load_checkpoint()`` is no common action: a rank may call it alone. So each rank posts what its target has, and
goes on. Only a rank with names that would be an error waits for what the others have posted, each in as many calls for
the same path.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress

import torch.distributed as dist

from stager.loading.extras import NO_OTHER_RANKS, KnownNames, OtherRanks
from stager.ranks.rank_group import some_ranks
from stager.ranks.rendezvous import Rendezvous
from stager.workers.errors import RankFailedError
from stager.workers.long_wait import LongWait

logger = logging.getLogger("stager")

_WAIT_SECS = 30.0
_DIGEST_BYTES = 8
_calls: Counter[str] = Counter()  # by path


class _RankNames(OtherRanks):
    """The other ranks, in one call of ``load_checkpoint()``.

    Args:
        path: of the checkpoint.
        number: of this call for the path.
        strict: whether names that only the checkpoint has are an error.
    """

    def __init__(self, path: str, number: int, strict: bool) -> None:
        self._path = path
        self._key = f"{path}/{number}"
        self._strict = strict

    def which_have(self, names: Collection[str], own: KnownNames, unexpected: Collection[str]) -> set[str]:
        """Return which of the names that would be an error the target of another rank has."""
        num_ranks = dist.get_world_size()
        rendezvous = Rendezvous(dist.distributed_c10d._get_default_store(), "stager/load_checkpoint", num_ranks)
        try:
            with suppress(RankFailedError):  # without the store this rank is on its own
                self._post(rendezvous, own.all())
                return self._found(rendezvous, set(unexpected), num_ranks) if self._strict and unexpected else set()
        finally:
            rendezvous.close()
        return set()

    def _post(self, rendezvous: Rendezvous, names: Iterable[str]) -> None:
        data = b"".join(sorted(map(_digest, names)))
        content = hashlib.blake2b(data, digest_size=16).hexdigest()
        rendezvous.post(f"names/{content}", data)  # ranks with the same names post the same
        rendezvous.post(f"{self._key}/{dist.get_rank()}", content.encode())  # last: who reads it finds the names

    def _found(self, rendezvous: Rendezvous, wanted: set[str], num_ranks: int) -> set[str]:
        by_digest = {_digest(name): name for name in wanted}
        found: set[str] = set()
        seen: set[bytes] = set()
        for rank in range(num_ranks):
            what = f"rank {some_ranks([rank])} to call load_checkpoint({self._path!r})"
            waiting = LongWait(
                what, _WAIT_SECS, reason="names that only the checkpoint has may be those of other ranks"
            )
            content = rendezvous.wait(f"{self._key}/{rank}", _WAIT_SECS, waiting.tick)
            if content is None:
                return found  # what was not found is told as unexpected
            if content not in seen:
                seen.add(content)
                data = rendezvous.read(f"names/{content.decode()}") or b""
                digests = (data[start : start + _DIGEST_BYTES] for start in range(0, len(data), _DIGEST_BYTES))
                found.update(by_digest[digest] for digest in digests if digest in by_digest)
            if len(found) == len(wanted):
                break
        return found


def ranks_of_this_job(path: str, into: object, *, strict: bool) -> tuple[OtherRanks, int]:
    """Return the ranks that may load their own parts of a checkpoint, too, and this rank's number.

    Args:
        path: of the checkpoint, absolute.
        into: what is loaded into; None: nothing, and names do not matter.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return NO_OTHER_RANKS, 0
    if into is None:
        return NO_OTHER_RANKS, dist.get_rank()
    _calls[path] += 1
    return _RankNames(path, _calls[path], strict), dist.get_rank()


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()
