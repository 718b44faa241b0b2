"""Loading on ranks that do not have the same names, order or number."""

from __future__ import annotations

from pathlib import Path

from tests.staging.ranks import run_ranks

_BODIES = "tests.ranks.load_bodies"


def test_pipeline_stages_load_strictly_and_what_is_really_missing_is_said(tmp_path: Path) -> None:
    results = run_ranks(f"{_BODIES}:load_stages", 2, tmp_path)
    for rank, (own, names, missing, _, by_path, alone) in enumerate(results):
        assert by_path[:2] == [1.0 + rank, 1.0 + rank] and by_path[2] == [f"own{1 - rank}"]  # it asked nobody of it
        assert alone == {"step": 5 * rank}
        assert own == [[f"layer{rank}.w"], 1.0 + rank, 1.0 + rank, ["shared", f"stage{rank}"]]
        assert names == [[], []]
        assert "model['layer9.w']: is in the target but not in the checkpoint" in missing
    first, second = (result[3] for result in results)
    assert "module['layer0.weight']: is in the checkpoint but not in the target" in first
    assert "layer1" not in first
    assert "model['layer0.w']: is in the checkpoint but not in the target" in second and "layer1" not in second


def test_objects_are_restored_in_one_order_wherever_they_are(tmp_path: Path) -> None:
    for others in run_ranks(f"{_BODIES}:load_in_other_orders", 2, tmp_path):
        assert others == [[name, name] for name in "abcdef"]


def test_values_of_ranks_that_are_gone_are_offered_and_named(tmp_path: Path) -> None:
    run_ranks(f"{_BODIES}:save_own", 3, tmp_path)
    (tmp_path / "store").unlink(missing_ok=True)
    (alone,) = run_ranks(f"{_BODIES}:load_own", 1, tmp_path)
    assert alone["own"] == [0, 0]
    assert alone["left"] == {
        "loader": {"1": [1, [1.0, 1.0]], "2": [2, [2.0, 2.0]]},
        "deep.rng": {"1": 10, "2": 20},
    }
    assert [text.partition(":")[0] for text in alone["warned"]] == ["loader", "deep['rng']"]
    assert "ranks that this job of 1 does not have (1, 2)" in alone["warned"][0]
    (tmp_path / "store").unlink(missing_ok=True)
    first, second = run_ranks(f"{_BODIES}:load_own", 2, tmp_path)
    assert (first["own"], second["own"]) == ([0, 0], [1, 10])
    assert first["left"] == {"loader": {"2": [2, [2.0, 2.0]]}, "deep.rng": {"2": 20}} and second["left"] == {}


def test_a_rank_that_fails_before_the_names_are_compared_is_not_waited_for(tmp_path: Path) -> None:
    first, second = run_ranks(f"{_BODIES}:one_rank_fails", 2, tmp_path)
    assert first[0].startswith("RankFailedError") and "not built yet" in first[0]
    assert second[0].startswith("UnloadableError: m:") and first[1] == second[1] == "loaded"


def test_what_does_not_fit_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    first, second = run_ranks(f"{_BODIES}:mismatch_on_one_rank", 2, tmp_path)
    assert first[3] == second[3] == "loaded"
    for other, own in zip(first[:3], second[:3], strict=True):
        assert own.startswith("StateMismatchError")
        assert other.startswith(
            "RankFailedError: the checkpoint of step 5 was not loaded on rank 1: StateMismatchError: "
        )
        assert other.endswith("; nothing was changed on any rank")


def test_what_one_rank_gives_that_cannot_be_meant_holds_up_no_other(tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(f"{_BODIES}:arguments_of_one_rank", 2, tmp_path)):
        assert said[1] == said[3] == "loaded"
        assert said[2 * rank].startswith("ArgumentError: into must be")
        other = said[2 - 2 * rank]
        assert other.startswith("RankFailedError") and "ArgumentError: into must be" in other


def test_damage_that_one_rank_finds_is_told_on_all(tmp_path: Path) -> None:
    for step, skipped, warned, has_event in run_ranks(f"{_BODIES}:damaged_for_one_rank", 2, tmp_path):
        assert (step, skipped, has_event) == (1, ["step-00000002"], True)
        assert warned == ["step-00000002 skipped on all ranks: dama"]
