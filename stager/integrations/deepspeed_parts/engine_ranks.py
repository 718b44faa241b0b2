"""The ranks of a training, which call its engine together: what one of them cannot do, all of them raise in that call.

NOTE [ All ranks raise in the same call ]
    An error that one rank alone raised would put the ranks out of step: DeepSpeed's next collective on the other ranks would
    meet a later one of this rank, and both would hang until the process group's timeout.
  So an error of one rank is kept until a call that every rank makes at the same place, create() or commit() of a save, or
  load_checkpoint(). There the ranks gather their errors, and either all raise or none.
  Each error belongs to a save, by its number. One rank may learn later than another that a save has failed, because it reads
  that in a file. Then it raises with the others nevertheless, and not a second time when it reads it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from stager.workers.errors import RankFailedError

_D = TypeVar("_D")
_Description = tuple[str, tuple[int, ...]]  # of an error: its text, and the ranks that failed
_THIS_CALL = -1  # no number of a save


@dataclass(frozen=True)
class Said(Generic[_D]):
    """What all ranks have said in one call.

    Attributes:
        failed: the numbers of the saves that failed on any rank.
        failure: of the oldest of them, on each rank its own error, if it has one; None: none failed.
        error: why the call itself failed on a rank; None: it did on none.
        details: what each rank added, by rank.
    """

    failed: frozenset[int]
    failure: BaseException | None
    error: BaseException | None
    details: list[_D]


class EngineRanks:
    """The ranks that save and load together, or one process without a process group. Every rank makes one at the same time.

    Args:
        raises: whether failed saves are raised; otherwise they are logged. What rank 0 says holds for all.

    Attributes:
        own: the rank of this process.
        count: the number of ranks.
        run: a name for this run, the same on all ranks.
        raises: see above.
    """

    def __init__(self, raises: bool) -> None:
        agreed: list[Any] = [uuid.uuid4().hex[:8], raises]
        self.own, self.count = 0, 1
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(agreed, src=0)
            self.own, self.count = dist.get_rank(), dist.get_world_size()
        self.run: str = agreed[0]
        self.raises: bool = agreed[1]

    def say(self, failures: Mapping[int, BaseException], error: BaseException | None, detail: _D) -> Said[_D]:
        """Tell all ranks the errors of this one, and wait for theirs. Every rank calls it at the same place.

        Args:
            failures: of earlier saves, by number.
            error: why this call fails on this rank.
            detail: anything small that the others are to know.
        """
        errors: dict[int, BaseException] = dict(failures)
        if error is not None:
            errors[_THIS_CALL] = error
        mine = {number: self._described(found) for number, found in errors.items()}
        of_all: list[Any] = [(mine, detail)]
        if self.count > 1:
            of_all = [None] * self.count
            dist.all_gather_object(of_all, (mine, detail))
        said = [descriptions for descriptions, _ in of_all]
        failed = frozenset(number for one in said for number in one if number != _THIS_CALL)
        failure = _error_of(min(failed), errors, said) if failed else None
        return Said(failed, failure, _error_of(_THIS_CALL, errors, said), [detail for _, detail in of_all])

    def _described(self, error: BaseException) -> _Description:
        if isinstance(error, RankFailedError):
            return str(error), error.ranks
        return f"rank {self.own}: {type(error).__name__}: {error}", (self.own,)


def _error_of(
    number: int, errors: Mapping[int, BaseException], said: list[Mapping[int, _Description]]
) -> BaseException | None:
    """Return this rank's error of a save, or else the one that another rank has told."""
    if number in errors:
        return errors[number]
    told = next((one[number] for one in said if number in one), None)
    return None if told is None else RankFailedError(*told)
