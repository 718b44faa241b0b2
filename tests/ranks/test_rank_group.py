"""One rank is a group of one: the same methods, answered at once. And what several ranks find in each other's messages."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from stager import RankFailedError, StorageError
from stager.ranks.agreement import WHOLE, Agreement
from stager.ranks.commit_watch import CommitWatch
from stager.ranks.messages import LeafEntry, NewestStep, Number, StepToLoad
from stager.ranks.rank_group import RankGroup
from stager.workers.checkpoint.commit.commit import Committed, partial_path
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import ClosedError
from tests.ranks.threads import on_ranks


def test_a_group_of_one_meets_nobody_and_starts_no_thread() -> None:
    group, before = RankGroup(), threading.active_count()
    group.barrier("here", "nothing")
    assert group.is_coordinator and group.is_alone
    assert group.broadcast("said", Number, lambda: Number(3), "say it") == Number(3)
    assert group.smallest("size", 7) == 7
    assert group.post_first("first", Number(1)) and not group.post_first("first", Number(2))
    assert group.first("first", Number) == Number(1)
    assert group.first("nobody", Number) is None
    assert threading.active_count() == before
    group.close()


def test_save_ids_of_a_group_of_one_differ_from_save_to_save_and_from_run_to_run() -> None:
    one, other = RankGroup(), RankGroup()
    ids = [group.save_id(1) for group in (one, one, other)]
    assert len(set(ids)) == 3


def test_a_group_of_one_holds_every_leaf() -> None:
    def refuse() -> dict[str, str]:
        raise AssertionError("nobody compares values with a group of one")

    entries = [LeafEntry("a", "float32", (4,))]
    settlement = Agreement(RankGroup()).settle("a save", entries, [entries], refuse)
    assert (settlement.plain, settlement.spreads) == ([WHOLE], [WHOLE])


class _NoPool:
    """Whose workers are gone."""

    def submit(self, *_: Any) -> Future[Any]:
        raise ClosedError("no pool")


def test_a_group_of_one_does_not_wait_for_receipts_that_somebody_removed(tmp_path: Path) -> None:
    spec = SaveSpec(str(tmp_path), 3, "ab", "dcp", 1, True, 1.0, "0", "0", rank=0, num_ranks=1)
    Path(partial_path(spec)).mkdir()
    pool: Any = _NoPool()
    watch, end = CommitWatch(RankGroup(timeout_secs=3600.0), pool), Future[Committed]()
    watch.expect(spec, end.set_result, end.set_exception)
    assert isinstance(end.exception(60), StorageError)
    assert watch.drain(60)
    assert not Path(partial_path(spec)).exists()
    watch.close(ClosedError("the test is over"))


def test_a_broadcast_reaches_every_rank() -> None:
    results = on_ranks(
        3, lambda group: group.broadcast("step", NewestStep, lambda: NewestStep(group.rank + 5), "say it")
    )
    assert results == [NewestStep(5)] * 3


def test_a_broadcast_that_fails_fails_on_every_rank_with_rank_0s_reason() -> None:
    def body(group: RankGroup) -> str:
        def make() -> StepToLoad:
            raise ValueError("nothing there")

        with pytest.raises((RankFailedError, ValueError)) as caught:
            group.broadcast("step", StepToLoad, make, "choose the checkpoint to load")
        return str(caught.value)

    first, *others = on_ranks(3, body)
    assert first == "nothing there"
    assert others == ["rank 0 could not choose the checkpoint to load: ValueError: nothing there"] * 2


def test_ranks_gather_what_they_contributed() -> None:
    def body(group: RankGroup) -> tuple[set[int], int]:
        group.contribute("list", Number(group.rank))
        group.barrier("all", "contributing")
        found = {number.value for number in group.gather("list", Number)}
        return found, len(group.gather("list", Number, at_most=2))

    assert on_ranks(3, body) == [({0, 1, 2}, 2)] * 3


def test_the_smallest_of_all_ranks() -> None:
    assert on_ranks(3, lambda group: group.smallest("size", 30 - group.rank % 2)) == [29] * 3


def test_the_first_message_stands_for_all() -> None:
    def body(group: RankGroup) -> tuple[bool, Number | None]:
        was_first = group.post_first("key", Number(group.rank))
        group.barrier("all", "posting")
        return was_first, group.first("key", Number)

    results = on_ranks(3, body)
    (first,) = [rank for rank, (was_first, _) in enumerate(results) if was_first]
    assert {number for _, number in results} == {Number(first)}
