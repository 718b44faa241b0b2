"""Ranks that are not all alike, and what a failed save leaves for the next ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.staging.ranks import run_ranks

_BODIES = "tests.ranks.hard_bodies"


def test_what_a_rank_has_for_itself_may_change_its_structure_there_alone(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:own_structure_changes", 2, tmp_path) == [[], []]


def test_the_ranks_settle_again_after_a_structure_that_changed_on_one_of_them(tmp_path: Path) -> None:
    outcomes = run_ranks(f"{_BODIES}:save_after_a_change_alone", 2, tmp_path)
    assert outcomes == [["saved", "failed", "saved", "saved"]] * 2


def test_a_rank_that_fails_before_it_settles_is_not_waited_for(tmp_path: Path) -> None:
    first, second = run_ranks(f"{_BODIES}:unstageable_at_first", 2, tmp_path)
    assert "RankFailedError" in first["text"]
    assert "failed on rank 1" in first["text"]
    assert "UnstageableError" in second["text"]
    assert first["steps"] == second["steps"] == [2]


def test_an_error_that_nobody_looked_at_keeps_no_rank_from_the_next_save(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:fail_once_and_go_on", 2, tmp_path) == [[1, 3, 4, 5]] * 2


@pytest.mark.long
def test_a_save_that_one_rank_gave_up_is_committed_by_no_other(tmp_path: Path) -> None:
    first, second = run_ranks(f"{_BODIES}:slow_rank", 2, tmp_path)
    for result in (first, second):
        assert result["error"] == "RankFailedError"
        assert "rank 1 did not finish its part" in result["text"]
        assert result["steps"] == [1]


def test_a_callback_that_would_wait_for_itself_is_refused(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:call_back", 2, tmp_path) == [["UsageError"] * 3] * 2


def test_names_of_ranks_that_overlap(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:subsets_that_overlap", 3, tmp_path) == [7] * 3


def test_tensors_without_elements_whoever_comes_first(tmp_path: Path) -> None:
    shapes = {"r": [0], "s": [0, 4], "t": [0, 4], "one": [1, 3], "scalar": []}
    assert run_ranks(f"{_BODIES}:empty_everywhere", 2, tmp_path) == [shapes] * 2


def test_a_rank_that_saves_for_itself_refuses_a_tensor_of_which_it_has_a_part(tmp_path: Path) -> None:
    for text in run_ranks(f"{_BODIES}:apart_with_shards", 2, tmp_path):
        assert text.startswith("UnstageableError: x: is a DTensor of which other ranks have the rest")


def test_one_rank_saves_in_pieces(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:pieces", 2, tmp_path) == [1, 1]


def test_a_checkpoint_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    for text in run_ranks(f"{_BODIES}:load_what_is_not_there", 2, tmp_path):
        assert text.startswith("CheckpointNotFoundError: ") and "99" in text


def test_a_checkpoint_that_was_seen_and_removed_is_not_waited_for(tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:ask_for_what_was_removed", 2, tmp_path) == [[1, 1]] * 2


def test_large_tensors_that_differ_are_named(tmp_path: Path) -> None:
    first, second = run_ranks(f"{_BODIES}:save_unequal_values", 2, tmp_path)
    problem = "other values: experts (ranks 0, 1). Only"
    assert problem in first[0] and problem in second[0]
    assert first[1] == second[1] == "saved"  # as the setting says
    assert "experts (ranks 0, 1). If" in first[2]
    assert (len(first), len(second)) == (3, 2)


@pytest.mark.parametrize("size", ["small", "large", "number"])
@pytest.mark.parametrize(("case", "paths"), [("dots", ["state['a.b']", "a['b']"]), ("int and str", ["x[1]", "x['1']"])])
def test_keys_of_one_name_on_different_ranks_are_refused_with_both_key_paths(
    case: str, paths: list[str], size: str, tmp_path: Path
) -> None:
    for text in run_ranks(f"{_BODIES}:keys_of_one_name", 2, tmp_path, case, size):
        assert "InconsistentRanksError" in text
        assert all(path in text for path in paths)


@pytest.mark.parametrize("size", ["small", "large"])
def test_keys_of_one_name_on_each_rank_get_names_of_their_own(size: str, tmp_path: Path) -> None:
    assert run_ranks(f"{_BODIES}:keys_of_one_name", 2, tmp_path, "on each rank", size) == ["whole", "whole"]


def test_memory_that_one_rank_has_freed_fails_that_save_with_the_name(tmp_path: Path) -> None:
    first, second = run_ranks("tests.ranks.load_bodies:save_freed_memory", 2, tmp_path)
    assert [first[0], first[2], second[0], second[2]] == ["saved"] * 4
    assert second[1].startswith("UnstageableError: w['a']") and "UnstageableError: w['a']" in first[1]
