"""Each byte is written once, and the ranks write about as much each."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager import Checkpointer
from tests.staging.ranks import run_ranks


def _files_nbytes(run: Path) -> int:
    return sum(path.stat().st_size for path in run.glob("step-*/*.distcp"))


@pytest.mark.parametrize("mib", [32, pytest.param(1024, marks=pytest.mark.long)])
def test_replicated_state_is_spread_over_the_ranks(mib: int, tmp_path: Path) -> None:
    shares = run_ranks("tests.ranks.bodies:save_replicated", 4, tmp_path, mib)
    total = sum(shares)
    assert mib << 20 <= total * 1.02
    assert _files_nbytes(tmp_path / "run") < total * 1.01 + (1 << 20)
    assert max(shares) <= 1.1 * total / 4
    assert min(shares) >= 0.9 * total / 4


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:save_stages", 4, tmp_path)
    with Checkpointer(tmp_path / "run", read_only=True) as ckpt:
        loaded = ckpt.load()
    assert loaded is not None
    state = loaded.state
    assert sorted(state) == ["note", "only 0", "only 1", "only 2", "only 3", "shared", "stage 0", "stage 1"]
    assert state["stage 1"]["name"] == "stage 1"
    assert state["stage 1"]["weight"].eq(1).all()
    assert [int(state[f"only {rank}"][0]) for rank in range(4)] == [0, 1, 2, 3]
    halves = [result["nbytes"] for result in results]
    assert all(nbytes < 700_000 * 4 * 0.6 for nbytes in halves)  # two ranks share a stage's weight


def test_a_plain_tensor_that_is_not_the_same_everywhere_is_named(tmp_path: Path) -> None:
    for text in run_ranks("tests.ranks.bodies:save_unequal", 2, tmp_path):
        assert "x is" in text
        assert "PerRank" in text


def test_a_new_structure_is_settled_again(tmp_path: Path) -> None:
    assert run_ranks("tests.ranks.bodies:save_after_change", 2, tmp_path) == [[10, 10]] * 2


def test_a_structure_that_changes_on_one_rank_only_fails_the_save_in_time(tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:change_alone", 2, tmp_path)
    assert "PerRank" in results[1]["error"]
    assert all(result["steps"] == [1] for result in results)
    assert "rank 1" in results[0]["error"]
