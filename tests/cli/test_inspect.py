from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Outcome


def test_facts_tensors_and_objects(saved_run: Path) -> None:
    shown = Outcome("inspect", saved_run / "step-00000020", "--json").json
    assert (shown["step"], shown["format"], shown["num_tensors"], shown["num_objects"]) == (20, "dcp", 4, 1)
    assert shown["torch"] == torch.__version__
    assert {file["name"]: file["nbytes"] for file in shown["files"]} == {
        path.name: path.stat().st_size
        for path in (saved_run / "step-00000020").iterdir()
        if path.name != "manifest.json"
    }
    tensors = {tensor["key"]: tensor for tensor in shown["tensors"]}
    assert {key: (t["dtype"], t["shape"], t["nbytes"]) for key, t in tensors.items()} == {
        "model.weight": ("float32", [300, 200], 240_000),
        "model.scale": ("float32", [], 4),
        "model.tied": ("float32", [300, 200], 240_000),
        "data.order.0": ("int64", [5], 40),
        "a\x1b[31mred": ("bfloat16", [2], 4),
    }
    assert [obj["key"] for obj in shown["objects"]] == ["data.order.1"]


def test_offset_is_where_the_bytes_are(saved_run: Path) -> None:
    checkpoint = saved_run / "step-00000020"
    (order,) = Outcome("inspect", checkpoint, "--keys", "data.order.0", "--json").json["tensors"]
    raw = (checkpoint / order["file"]).read_bytes()[order["offset"] : order["offset"] + order["nbytes"]]
    assert torch.frombuffer(bytearray(raw), dtype=torch.int64).tolist() == [0, 1, 2, 3, 4]


def test_tied_tensors_name_each_other(saved_run: Path) -> None:
    tensors = {t["key"]: t for t in Outcome("inspect", saved_run, "--json").json["tensors"]}
    assert tensors["model.weight"]["same_as"] is None
    assert tensors["model.tied"]["same_as"] == "model.weight"
    assert tensors["model.tied"]["offset"] == tensors["model.weight"]["offset"]


def test_newest_of_a_run_unless_a_step_is_named(saved_run: Path) -> None:
    assert Outcome("inspect", saved_run, "--json").json["step"] == 300
    assert Outcome("inspect", saved_run, "--step", 20, "--json").json["step"] == 20


def test_table_shows_each_key_with_its_facts(saved_run: Path) -> None:
    outcome = Outcome("inspect", saved_run)
    cells = [line.split() for line in outcome.out.splitlines()]
    assert outcome.code == 0
    assert ["step", "300"] in cells
    assert ["model.scale", "float32", "scalar", "4", "__0_0.distcp"] in [row[:5] for row in cells]
    assert [row[-1] for row in cells if row[:1] == ["model.tied"]] == ["model.weight"]


def test_escape_sequence_in_a_key_does_not_reach_the_terminal(saved_run: Path) -> None:
    out = Outcome("inspect", saved_run).out
    assert "\x1b" not in out
    assert "a\\x1b[31mred" in out


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("model.*", ["model.weight", "model.scale", "model.tied"]),
        ("*.scale", ["model.scale"]),
        ("model", []),
    ],
)
def test_keys_narrow_and_no_match_is_a_no(glob: str, expected: list[str], saved_run: Path) -> None:
    outcome = Outcome("inspect", saved_run, "--keys", glob, "--json")
    assert [t["key"] for t in outcome.json["tensors"]] == expected
    assert outcome.code == (0 if expected else 1)


def test_no_match_is_said(saved_run: Path) -> None:
    assert "no key matches" in Outcome("inspect", saved_run, "--keys", "x").out


def test_long_tables_are_cut_and_say_so(saved_run: Path) -> None:
    out = Outcome("inspect", saved_run, "--limit", 2).out
    assert "model.scale" in out
    assert "data.order.0" not in out
    assert "... and 3 more tensors; narrow with --keys" in out
    assert "more" not in Outcome("inspect", saved_run, "--limit", 0).out


def test_damaged_manifest_is_an_error_not_a_traceback(run: Path) -> None:
    (run / "step-00000300" / "manifest.json").write_text("[]")
    outcome = Outcome("inspect", run)
    assert (outcome.code, outcome.out) == (1, "")
    assert f"{run}/step-00000300/manifest.json" in outcome.err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_step_that_is_not_there_is_answered_with_those_that_are(command: str, saved_run: Path) -> None:
    outcome = Outcome(command, saved_run, "--step", 7)
    assert (outcome.code, outcome.err) == (
        1,
        f"stager: {saved_run}: no checkpoint of step 7; there are steps 300, 20, 1\n",
    )


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_run_without_checkpoints(command: str, tmp_path: Path) -> None:
    assert Outcome(command, tmp_path).err == f"stager: {tmp_path}: the directory has no committed checkpoint\n"
    assert Outcome(command, tmp_path).code == 1
    assert Outcome(command, tmp_path, "--step", 7).err.endswith("no checkpoint of step 7; there are no checkpoints\n")
    assert Outcome(command, tmp_path / "none").err == f"stager: {tmp_path / 'none'}: no such directory\n"


def test_step_of_a_single_checkpoint_is_wrong_usage(saved_run: Path) -> None:
    outcome = Outcome("inspect", saved_run / "step-00000001", "--step", 1)
    assert outcome.code == 2
    assert "is one checkpoint" in outcome.err
