from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from tests.cli.conftest import STEPS, Outcome, flip_bit


def test_committed_checkpoints_are_listed_oldest_first(saved_run: Path) -> None:
    outcome = Outcome("ls", saved_run)
    rows = [line.split() for line in outcome.out.splitlines()]
    assert outcome.code == 0
    assert [row[:2] for row in rows] == [["step", "status"], *([str(step), "committed"] for step in STEPS)]
    assert all(row[2:4] == rows[1][2:4] and row[3] == "KiB" for row in rows[1:])  # all of one size


def test_json_has_the_exact_facts(saved_run: Path) -> None:
    listed = Outcome("ls", saved_run, "--json").json
    assert listed["directory"] == str(saved_run)
    assert [row["step"] for row in listed["checkpoints"]] == list(STEPS)
    for row in listed["checkpoints"]:
        path = Path(row["path"])
        assert (row["status"], row["reason"], row["num_tensors"], row["num_objects"]) == ("committed", "", 4, 1)
        assert row["nbytes"] == sum(f.stat().st_size for f in path.iterdir() if f.name != "manifest.json")
        assert abs(time.time() - row["created"]) < 3600


def test_what_does_not_count_is_listed_with_the_reason(run: Path) -> None:
    (run / "step-00000400.partial-0abc").mkdir()
    (run / "step-00000400.partial-0abc" / "data").write_bytes(bytes(5000))
    (run / "step-00000020" / "manifest.json").write_text("{")
    (run / "step-00000500").mkdir()
    shutil.copytree(run / "step-00000001", run / "step-00000002")
    outcome = Outcome("ls", run, "--json")
    rows = {row["name"]: row for row in outcome.json["checkpoints"]}
    assert outcome.code == 0
    assert {name: row["status"] for name, row in rows.items()} == {
        "step-00000001": "committed",
        "step-00000002": "invalid",
        "step-00000020": "invalid",
        "step-00000300": "committed",
        "step-00000400.partial-0abc": "partial",
        "step-00000500": "invalid",
    }
    assert "not committed" in rows["step-00000400.partial-0abc"]["reason"]
    assert (rows["step-00000400.partial-0abc"]["nbytes"], rows["step-00000400.partial-0abc"]["step"]) == (5000, 400)
    assert "renamed" in rows["step-00000002"]["reason"]
    assert "manifest" in rows["step-00000500"]["reason"]
    table = Outcome("ls", run).out
    assert all(row["reason"].replace(f"{run}/", "") in table for row in rows.values())
    shutil.rmtree(run / "step-00000400.partial-0abc")


def test_verify_hashes_and_says_no(run: Path) -> None:
    assert Outcome("ls", run, "--verify").code == 0
    flip_bit(run / "step-00000020" / "__0_0.distcp", 5000)
    assert Outcome("ls", run).code == 0  # manifests only
    outcome = Outcome("ls", run, "--verify", "--json")
    assert outcome.code == 1
    assert [row["status"] for row in outcome.json["checkpoints"]] == ["committed", "invalid", "committed"]
    assert "__0_0.distcp" in outcome.json["checkpoints"][1]["reason"]


def test_empty_directory(tmp_path: Path) -> None:
    outcome = Outcome("ls", tmp_path)
    assert (outcome.code, outcome.out) == (0, f"no checkpoints in {tmp_path}\n")
    assert Outcome("ls", tmp_path, "--json").json["checkpoints"] == []


def test_no_such_directory(tmp_path: Path) -> None:
    outcome = Outcome("ls", tmp_path / "none")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == f"stager: {tmp_path / 'none'}: no such directory\n"


def test_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = Outcome("ls", tmp_path / "file")
    assert (outcome.code, outcome.err) == (1, f"stager: {tmp_path / 'file'}: is not a directory\n")


def test_checkpoint_in_place_of_the_runs_directory_is_wrong_usage(saved_run: Path) -> None:
    outcome = Outcome("ls", saved_run / "step-00000001")
    assert outcome.code == 2
    assert "is one checkpoint" in outcome.err


def test_directory_whose_name_is_no_text(run: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(run.parent) + b"/\xff"))
    run.rename(odd)
    outcome = Outcome("ls", odd)
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.out.splitlines()[1:]] == [str(step) for step in STEPS]
    assert Outcome("ls", f"{odd}-none").err.endswith("\\udcff-none: no such directory\n")
