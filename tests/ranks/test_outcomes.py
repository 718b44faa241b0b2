"""How a save ends on a rank that did not commit it, over torch's in-memory store."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from stager.ranks import outcome
from stager.ranks.board import Board
from stager.ranks.job import Job
from stager.ranks.outcome import Outcomes
from workers.commit import Committed
from workers.directory import CheckpointInfo
from workers.errors import ClosedError, RankFailedError, StorageError
from workers.job import SaveFacts


class _NoPool:
    """Whose workers are gone."""

    def submit(self, *_: Any) -> Future[Any]:
        raise ClosedError("no pool")


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Outcomes]]:
    store = dist.HashStore()
    jobs = [Job(rank, 2, Board(store, "test", 2), 5.0, "nonce") for rank in range(2)]
    both = [Outcomes(job, _NoPool()) for job in jobs]
    yield both
    for job, one in zip(jobs, both, strict=True):
        one.close(ClosedError("the test is over"))
        job.close()


def _facts(directory: Path, save_id: str = "ab") -> SaveFacts:
    return SaveFacts(str(directory), 3, save_id, "dcp", 1, True, 1.0, "0", "0", rank=0, num_ranks=2)


def _end(one: Outcomes, facts: SaveFacts) -> Committed:
    ended: Future[Committed] = Future()
    one.expect(facts, ended.set_result, ended.set_exception)
    return ended.result(20)


def test_a_checkpoint_that_was_removed_before_this_rank_looked_was_committed(
    ranks: list[Outcomes], tmp_path: Path
) -> None:
    info = CheckpointInfo(3, "/elsewhere/step-00000003", 10, 1.0, "ab", 1, 0, "dcp")
    ranks[1].notes.post_committed(Committed(info, 1.0, 2.0, 77))
    end = _end(ranks[0], _facts(tmp_path))
    assert end.info.path == str(tmp_path / "step-00000003")
    assert (end.info.nbytes, end.pid) == (10, 77)


def test_a_directory_that_cannot_be_read_now_fails_no_save(
    ranks: list[Outcomes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: SaveFacts) -> None:
        raise StorageError(errno.EIO, "cannot read", str(tmp_path))

    monkeypatch.setattr(outcome, "already_committed", refuse)
    ranks[1].notes.post_failed("ab", ValueError("mine"))
    with pytest.raises(RankFailedError, match="the save of step 3 failed on rank 1: ValueError: mine"):
        _end(ranks[0], _facts(tmp_path))
