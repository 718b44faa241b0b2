"""Who holds the same, settled by ranks that are threads here, over torch's in-memory store."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from stager.ranks.agreement import Agreement, Partition, Settlement
from stager.ranks.messages import LeafDigests, LeafEntry
from stager.ranks.rank_group import RankGroup
from stager.workers.errors import InconsistentRanksError, RankFailedError
from tests.ranks.threads import on_ranks


def plain(*names: str) -> list[LeafEntry]:
    return [LeafEntry(name, "float32", (4,)) for name in names]


def shard(name: str, offset: int) -> LeafEntry:
    return LeafEntry(name, "float32", (8,), (offset,), (4,))


def test_what_is_the_same_everywhere_is_held_by_all_in_the_order_of_the_ranks() -> None:
    results = on_ranks(4, lambda group: Agreement(group).settle("a save", plain("a", "b"), []))
    assert results == [Settlement([Partition(rank, 4)] * 2, [], same_names=True) for rank in range(4)]


def test_shards_of_two_halves_of_the_ranks() -> None:
    results = on_ranks(4, lambda group: Agreement(group).settle("a save", [], [[shard("w", 4 * (group.rank % 2))]]))
    held = [settled.spreads[0] for settled in results]
    assert all(one.count == 2 for one in held)
    assert {held[0].index, held[2].index} == {0, 1}
    assert {held[1].index, held[3].index} == {0, 1}


def test_spreads_are_settled_apart() -> None:
    def body(group: RankGroup) -> Settlement:
        return Agreement(group).settle("a save", [], [[shard("own", 4 * group.rank)], [shard("same", 0)]])

    results = on_ranks(2, body)
    assert [settled.spreads[0] for settled in results] == [Partition(0, 1)] * 2
    assert {settled.spreads[1].index for settled in results} == {0, 1}


def test_names_that_only_some_ranks_have() -> None:
    names: list[Sequence[str]] = [("all", "s0"), ("all", "s0"), ("all", "s1"), ("all", "mine", "s1")]
    results = on_ranks(4, lambda group: Agreement(group).settle("a save", plain(*names[group.rank]), []))
    assert [settled.plain[0] for settled in results] == [Partition(rank, 4) for rank in range(4)]
    assert results[3].plain[1] == Partition(0, 1)
    assert {results[0].plain[1], results[1].plain[1]} == {Partition(0, 2), Partition(1, 2)}
    assert {results[2].plain[1], results[3].plain[2]} == {Partition(0, 2), Partition(1, 2)}
    assert not any(settled.same_names for settled in results)


def test_names_of_shards_that_only_some_ranks_have() -> None:
    """What they have beside these is the same, and held by all."""

    def body(group: RankGroup) -> Settlement:
        names = ["all", "w"] if group.rank else ["all"]
        return Agreement(group).settle("a save", plain("all"), [[shard("w", 0)]] * group.rank, outline=str(names))

    results = on_ranks(2, body)
    assert results == [
        Settlement([Partition(rank, 2)], [Partition(0, 1)] * rank, same_names=False) for rank in range(2)
    ]


def test_one_name_for_two_tensors_is_an_error_on_every_rank() -> None:
    def body(group: RankGroup) -> str:
        with pytest.raises(InconsistentRanksError) as caught:
            Agreement(group).settle("a save", [LeafEntry("a", "float32", (group.rank,))], [])
        return str(caught.value)

    assert all("a is float32 of shape" in text for text in on_ranks(2, body))


def test_a_rank_that_does_not_come_is_named() -> None:
    def body(group: RankGroup) -> tuple[int, ...]:
        if group.rank == 1:
            return ()
        with pytest.raises(RankFailedError, match="rank 1 did not come") as caught:
            Agreement(group).settle("a save", plain("a"), [])
        return caught.value.ranks

    assert on_ranks(3, body, timeout_secs=0.3) == [(1,), (), (1,)]


def test_rounds_do_not_mix() -> None:
    def body(group: RankGroup) -> list[Settlement]:
        agreement = Agreement(group)
        return [agreement.settle("1", plain("a"), []), agreement.settle("2", plain("a", "b"), [])]

    for rank, (first, second) in enumerate(on_ranks(2, body)):
        assert first == Settlement([Partition(rank, 2)], [], same_names=True)
        assert second == Settlement([Partition(rank, 2)] * 2, [], same_names=True)


def test_values_that_differ_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def body(group: RankGroup) -> None:
        values = {"same": "0", "rng": str(group.rank), "loader": str(group.rank // 2)}
        Agreement(group).settle("a save", plain("loader", "rng", "same"), [], lambda: LeafDigests(0, {}, values))

    on_ranks(3, body)
    (record,) = [record for record in caplog.records if "not the same" in record.message]
    assert "loader (ranks 0, 2), rng (ranks 0, 1, 2)." in record.message
    assert "same" not in record.message.partition("stored once")[2]


def _settle_tensors(group: RankGroup, names: Sequence[str], values: dict[str, str], differing: str = "error") -> str:
    try:
        Agreement(group, differing).settle("a save", plain(*names), [], lambda: LeafDigests(0, values, {}))
    except InconsistentRanksError as error:
        return str(error)
    return "settled"


def test_tensors_that_differ_are_an_error_on_every_rank_that_names_them_and_the_ranks() -> None:
    said = on_ranks(3, lambda group: _settle_tensors(group, "ab", {"a": "0", "b": str(group.rank == 2)}))
    assert said[0] == said[1] == said[2]
    assert re.search(r"other values: b \(ranks [01], 2\)\. Only", said[0])


def test_tensors_that_differ_between_ranks_of_different_kinds_are_an_error_on_every_rank() -> None:
    """However many kinds there are, each contributes what it has."""
    names = [["all", f"stage {rank}"] for rank in range(12)]

    def body(group: RankGroup) -> str:
        return _settle_tensors(group, names[group.rank], {"all": str(group.rank == 11), f"stage {group.rank}": "0"})

    said = on_ranks(12, body)
    assert all("other values: all (ranks 0, 11). Only" in text for text in said)


def test_tensors_that_differ_are_a_warning_if_the_setting_of_rank_0_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def body(group: RankGroup) -> str:
        return _settle_tensors(group, "a", {"a": str(group.rank)}, "error" if group.rank else "warn")

    assert on_ranks(2, body) == ["settled"] * 2
    (record,) = [record for record in caplog.records if "not the same" in record.message]
    assert "a (ranks 0, 1)" in record.message


def test_values_that_are_the_same_are_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    values = LeafDigests(0, {"a": "0"}, {"b": "0"})
    on_ranks(3, lambda group: Agreement(group).settle("a save", plain("a", "b"), [], lambda: values))
    assert not caplog.records
