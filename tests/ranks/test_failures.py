"""A rank that fails, or dies, in each state of a save: no rank hangs, and nothing partial is seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from stager import Checkpointer
from tests.ranks.bodies import COMMITTED_ALL_THE_SAME, TRAINER_POINTS, WORKER_POINTS
from tests.staging.ranks import run_ranks


def _deaths() -> list[Any]:
    """Rank 0, which looks for all, and another one, in turn; ``make long`` has the others."""
    return [
        pytest.param(point, victim, marks=() if number % 2 == victim else pytest.mark.long)
        for number, point in enumerate([*TRAINER_POINTS, *WORKER_POINTS])
        for victim in (0, 1)
    ]


@pytest.mark.parametrize(("point", "victim"), _deaths())
def test_a_rank_is_killed(point: str, victim: int, tmp_path: Path) -> None:
    """The store is nobody's: it goes on answering."""
    results = run_ranks("tests.ranks.bodies:die_in_save", 3, tmp_path, point, victim)
    _check_that_the_others_know(results, point, victim, tmp_path)


def _check_that_the_others_know(results: list[Any], point: str, victim: int, directory: Path) -> None:
    assert results[victim] is None
    steps = _steps(directory / "run")
    is_committed = point in COMMITTED_ALL_THE_SAME
    for survivor in (results[1 - victim], results[2]):
        if is_committed:
            assert survivor["error"] == ""
        else:
            assert survivor["ranks"] == [victim]
            assert f"rank {victim} did not finish its part" in survivor["error"]
    assert steps == ([1, 2] if is_committed else [1])
    assert not [name for name in os.listdir(directory / "run") if "partial" in name]


def _steps(run: Path) -> list[int]:
    with Checkpointer(run) as ckpt:  # waits for the workers of the rank that was killed, and tidies up
        steps = [info.step for info in ckpt.checkpoints()]
        newest = ckpt.latest()
    assert newest is not None
    assert newest.step == steps[-1]
    return steps


def test_a_rank_whose_disk_fails_fails_the_save_everywhere_and_the_next_one_works(tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:fail_in_save", 3, tmp_path, 2)
    assert results[2]["kind"] == "StorageError"
    for other in results[:2]:
        assert other["kind"] == "RankFailedError"
        assert "failed on rank 2" in other["error"]
        assert "No space left" in other["error"]
    assert all(result["steps"] == [1, 3] for result in results)
    assert not [name for name in os.listdir(tmp_path / "run") if "partial" in name]


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_a_failed_save_that_nobody_reads_is_raised_in_the_same_save_of_all_ranks_or_in_none(
    on_save_error: str, tmp_path: Path
) -> None:
    results = run_ranks("tests.ranks.bodies:go_on_after_a_failure", 3, tmp_path, 2, on_save_error)
    assert [result["steps"] for result in results] == [[1, 3, 4, 5, 6, 7]] * 3
    assert results[0]["raised"] == results[1]["raised"] == results[2]["raised"]
    assert len(results[0]["raised"]) == (1 if on_save_error == "raise" else 0)


@pytest.mark.parametrize(("damage", "step"), [(False, 2), (True, 1)])
def test_all_ranks_load_the_same_checkpoint(damage: bool, step: int, tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:load_damaged", 2, tmp_path, damage)
    assert results == [{"step": step, "problems": []}] * 2


def test_ranks_that_do_not_see_one_directory_are_told(tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:not_one_directory", 2, tmp_path)
    assert "shared file system" in results[1]
