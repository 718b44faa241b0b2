"""Several ranks whose checkpoints are in an object store: one checkpoint, one lease."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager import Checkpointer, verify
from stager.workers.checkpoint.storage.places import storage_of
from tests.object_stores.test_checkpointer import LEFT, objects
from tests.ranks.bodies import COMMITTED_ALL_THE_SAME, TRAINER_POINTS, WORKER_POINTS
from tests.staging.ranks import run_ranks

BODIES = "tests.object_stores.rank_bodies"


def test_shards_are_saved_by_two_ranks_and_loaded_by_one_and_by_three(run_url: str, tmp_path: Path) -> None:
    assert run_ranks(f"{BODIES}:save", 2, tmp_path, run_url, "fsdp") == [7] * 2
    report = verify(f"{run_url}/step-00000007")
    assert report.ok
    for num_ranks, layout in ((2, "fsdp"), (1, "plain"), (3, "fsdp")):
        for left in [tmp_path / "store", *tmp_path.glob("result-*")]:
            left.unlink(missing_ok=True)
        assert run_ranks(f"{BODIES}:load", num_ranks, tmp_path, run_url, layout) == [[]] * num_ranks
        assert storage_of(run_url).lock_nonce(run_url) == "", "the lease was not given back"
    keys = objects(run_url)
    assert not any(map(LEFT.search, keys))
    assert {key.split("/")[0] for key in keys if ".data-" not in key} == {
        ".stager.lock",
        "step-00000006",
        "step-00000007",
    }


def _deaths() -> list[object]:
    """Each point once in the short suite, with one victim; the long one has the other."""
    return [
        pytest.param(point, victim, marks=() if number % 4 == 2 * victim else pytest.mark.long)
        for number, point in enumerate([*TRAINER_POINTS, *WORKER_POINTS])
        for victim in (0, 1)
    ]


@pytest.mark.parametrize(("point", "victim"), _deaths())
def test_a_rank_is_killed(point: str, victim: int, run_url: str, tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:die_in_save", 2, tmp_path, point, victim, run_url)
    assert results[victim] is None
    is_committed = point in COMMITTED_ALL_THE_SAME
    said = results[1 - victim]["error"]
    assert said == "" if is_committed else f"rank {victim} did not finish its part" in said
    with Checkpointer(run_url) as ckpt:  # waits for the workers of the rank that was killed, and tidies up
        steps = [info.step for info in ckpt.checkpoints()]
    assert steps == ([1, 2] if is_committed else [1])
    keys = objects(run_url)
    assert not any(map(LEFT.search, keys))
    assert len({key.split("/")[0] for key in keys if ".data-" in key}) == len(steps)


def test_a_run_that_somebody_has_is_refused_on_all_ranks(run_url: str, tmp_path: Path) -> None:
    lock = storage_of(run_url).lock(run_url, 0, "a" * 16)
    try:
        first, second = run_ranks(f"{BODIES}:refused", 2, tmp_path, run_url)
    finally:
        lock.close()
    assert first.startswith("DirectoryInUseError") and second.startswith("RankFailedError"), (first, second)
