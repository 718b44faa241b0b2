"""What a run does with replicas while it goes on, and when it ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replication.test_restoring import memory_of, ranks
from tests.small_disk import small_disk_at


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_a_run_that_is_closed_leaves_nothing_in_memory(num_ranks: int, tmp_path: Path) -> None:
    """Pairs, and a ring. No collective is called in the training thread, and nothing is warned about."""
    for result in ranks("close_run", num_ranks, tmp_path):
        assert result["said"] == []
        assert "replicate" in result["timings"]
    assert memory_of(tmp_path) == []


def test_a_run_that_fails_leaves_its_replicas(tmp_path: Path) -> None:
    assert [result["said"] for result in ranks("fail_run", 2, tmp_path)] == [[], []]
    assert len(memory_of(tmp_path)) == 8
    shutil.rmtree(tmp_path / "run")
    assert [result["step"] for result in ranks("resume", 2, tmp_path, 3)] == [3, 3]


def test_a_deleted_checkpoint_does_not_come_back_from_memory(tmp_path: Path) -> None:
    ranks("delete_and_fail", 2, tmp_path)
    assert len(memory_of(tmp_path)) == 7  # all that four replicas have, but for one header
    assert [(result["step"], result["steps"]) for result in ranks("resume", 2, tmp_path, 2)] == [(1, [1]), (1, [1])]


def test_a_rank_whose_save_fails_holds_up_nobody(tmp_path: Path) -> None:
    results = ranks("one_cannot_save", 3, tmp_path, 1)
    # Rank 2 keeps what rank 1 has, and hears that it has nothing; nobody's connection is lost.
    said = [[text for text in result["said"] if "replica" in text] for result in results]
    assert [len(texts) for texts in said] == [0, 0, 1]
    assert said[2][0].startswith("no new replica of rank 1: rank 1 has nothing to send: OSError: ")


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "memory", 64 << 10) as mount:
        yield mount


def test_there_is_no_memory_for_replicas(small_memory: Path, tmp_path: Path) -> None:
    for rank, result in enumerate(ranks("no_memory", 2, tmp_path)):
        assert result["steps"] == [1, 2]
        for text in result["said"]:
            assert text.startswith(f"no new replica of rank {1 - rank}: this host has no memory for ")
            assert "No space left" in text


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("save.planned", marks=pytest.mark.long),
        "save.copied",
        pytest.param("save.handed-over", marks=pytest.mark.long),
    ],
)
def test_a_partner_that_dies_holds_up_nobody(point: str, tmp_path: Path) -> None:
    survivor, dead = ranks("partner_dies", 2, tmp_path, point)
    assert dead is None
    assert survivor["errors"][1] == "RankFailedError"
    assert any("is not replicated" in text and "rank 1" in text for text in survivor["said"])


def test_load_after_close_restores_nothing(tmp_path: Path) -> None:
    assert ranks("load_after_close", 2, tmp_path) == [1, 1]


@pytest.mark.remains  # what the workers go on with
def test_an_interrupted_close_waits_for_no_replica(tmp_path: Path) -> None:
    assert ranks("interrupt_closing", 2, tmp_path) == [False, False]


def test_a_run_that_waits_for_the_lock_finds_its_place_in_memory(tmp_path: Path) -> None:
    assert ranks("next_run_waits_for_the_lock", 2, tmp_path) == [[1], [1]]


def test_a_call_that_one_rank_refuses_shifts_nothing(tmp_path: Path) -> None:
    """It never gets as far as a save on that rank. The next ones find their partners."""
    first, second = ranks("refuse_once", 2, tmp_path)
    assert first["error"] == "RankFailedError"
    assert first["whole"] == second["whole"] == [True, True]
