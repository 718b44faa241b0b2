from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.conftest import STEPS, Outcome, flip_bit

DATA = "__0_0.distcp"


def test_whole_checkpoint(saved_run: Path) -> None:
    outcome = Outcome("verify", saved_run / "step-00000020")
    assert outcome.code == 0
    assert outcome.out.startswith(f"ok   {saved_run}/step-00000020: every byte as committed (5 items")


def test_json(saved_run: Path) -> None:
    answer = Outcome("verify", saved_run, "--json").json
    (checkpoint,) = answer["checkpoints"]
    assert (answer["ok"], answer["quick"], checkpoint["ok"], checkpoint["problems"]) == (True, False, True, [])
    assert checkpoint["path"] == str(saved_run / "step-00000300")
    assert checkpoint["num_items"] == 5


@pytest.mark.parametrize(
    ("options", "steps"), [((), [300]), (("--step", "20"), [20]), (("--all",), sorted(STEPS, reverse=True))]
)
def test_which_checkpoints_of_a_run(options: tuple[str, ...], steps: list[int], saved_run: Path) -> None:
    checkpoints = Outcome("verify", saved_run, "--json", *options).json["checkpoints"]
    assert [os.path.basename(c["path"]) for c in checkpoints] == [f"step-{step:08d}" for step in steps]


def test_flipped_bit_is_a_no_and_names_the_file(run: Path) -> None:
    flip_bit(run / "step-00000300" / DATA, 5000)
    outcome = Outcome("verify", run)
    assert outcome.code == 1
    assert outcome.out.startswith(f"BAD  {run}/step-00000300: 1 problem(s)\n     {run}/step-00000300/{DATA}: ")


def test_all_goes_on_after_a_damaged_one(run: Path) -> None:
    flip_bit(run / "step-00000020" / DATA, 5000)
    outcome = Outcome("verify", run, "--all", "--json")
    assert outcome.code == 1
    assert [checkpoint["ok"] for checkpoint in outcome.json["checkpoints"]] == [True, False, True]
    assert outcome.json["ok"] is False


def test_quick_sees_sizes_and_names_only(run: Path) -> None:
    data = run / "step-00000300" / DATA
    flip_bit(data, 5000)
    assert Outcome("verify", run, "--quick").code == 0
    assert "names and sizes as committed" in Outcome("verify", run, "--quick").out
    os.truncate(data, data.stat().st_size - 1)
    assert Outcome("verify", run, "--quick").code == 1
    data.unlink()
    assert Outcome("verify", run, "--quick").code == 1


def test_missing_manifest_and_missing_directory_are_a_no(run: Path) -> None:
    (run / "step-00000300" / "manifest.json").unlink()
    outcome = Outcome("verify", run)
    assert outcome.code == 1
    assert "manifest" in outcome.out
    assert Outcome("verify", run / "step-00009999").code == 1


def test_whole_checkpoint_under_the_name_of_another_step_is_a_no(run: Path) -> None:
    (run / "step-00000300").rename(run / "step-00000301")
    outcome = Outcome("verify", run)
    assert outcome.code == 1
    assert "step 300: the directory was renamed" in outcome.out


def test_checkpoint_that_was_moved_elsewhere_is_verified_by_its_manifest(run: Path, tmp_path: Path) -> None:
    (run / "step-00000300").rename(tmp_path / "best")
    assert Outcome("verify", tmp_path / "best").code == 0
    flip_bit(tmp_path / "best" / DATA, 5000)
    assert Outcome("verify", tmp_path / "best").code == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--all", "--step", "1"), "were both given; give one of them"),
        (("--step", "-1"), "step"),
        (("--threads", "0"), "threads"),
        (("--stepp", "1"), "--stepp"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], words: str, saved_run: Path) -> None:
    outcome = Outcome("verify", saved_run, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def test_all_of_a_single_checkpoint_is_wrong_usage(saved_run: Path) -> None:
    assert Outcome("verify", saved_run / "step-00000001", "--all").code == 2


def test_one_thread_is_enough(saved_run: Path) -> None:
    assert Outcome("verify", saved_run, "--threads", 1).code == 0
