"""The whole demo on one rank, once, small; and that it fails when what it compares differs."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stager import Checkpointer, UsageError
from stager.demo import DemoConfig, run_demo
from stager.demo import job as job_module
from stager.demo.bars import Bars
from stager.demo.checks import check_final_state, check_losses, check_resumes, check_stock_load, check_workers_gone
from stager.demo.events import Resumed
from stager.demo.leg import Aim
from stager.demo.results import Results
from stager.demo.run import conclude
from stager.demo.story import Story
from stager.demo.workspace import Workspace
from tests import forked_subprocess
from tests.demo.conftest import global_state_put_back

pytestmark = pytest.mark.costly_fixture


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def told(tiny_config: DemoConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Results]:
    """All acts of a tiny demo, with everything they left behind."""
    workspace = Workspace.prepare(tmp_path_factory.mktemp("demo"), tiny_config)
    with Bars(quiet()) as bars, global_state_put_back(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "subprocess", forked_subprocess)
        return workspace, Story(tiny_config, 1, workspace, bars).tell()


@pytest.fixture
def evidence(told: tuple[Workspace, Results], tmp_path: Path) -> tuple[Workspace, Results]:
    """A copy of it that a test may damage."""
    workspace, results = told
    shutil.copytree(workspace.root, tmp_path / "copy")
    copied = Workspace(tmp_path / "copy")
    truth, *legs = [replace(leg, directory=copied.run(leg.name)) for leg in results.runs]
    return copied, replace(results, truth=truth, legs=legs, checks=results.checks[-1:])  # that of the stock load


def flip_a_bit(path: Path, *keys: Any) -> None:
    """In a tensor of a state that ``torch.save`` wrote."""
    state = torch.load(path, weights_only=True)
    holder: Any = state
    for key in keys:
        holder = holder[key]
    holder.view(torch.uint8).view(-1)[0] ^= 1
    torch.save(state, path)


def judge(evidence: tuple[Workspace, Results], config: DemoConfig) -> tuple[int, str]:
    """Compare again, report: the exit code and what was printed."""
    workspace, results = evidence
    console = quiet()
    with Bars(quiet()) as bars:
        story = Story(config, 1, workspace, bars)
        story.results = results
        story.compare(bars.begin("compare", 2))
    return conclude(results, config, workspace, console, as_json=False), text_of(console)


def test_demo_shows_everything(told: tuple[Workspace, Results]) -> None:
    _, results = told
    assert [check.name for check in results.checks if not check.ok] == []
    assert len(results.checks) == 6


def test_trainer_was_killed_in_the_middle_of_two_saves_and_its_workers_ended(told: tuple[Workspace, Results]) -> None:
    _, results = told
    kills = [leg.kill for leg in results.legs if leg.kill is not None]
    assert len([kill for kill in kills if kill.hit is not None]) >= 2
    assert all(kill.num_workers > 0 and kill.left == () for kill in kills)
    assert results.legs[-1].kill is None


def test_last_checkpoint_is_that_of_the_last_step(told: tuple[Workspace, Results], tiny_config: DemoConfig) -> None:
    workspace, _ = told
    latest = Checkpointer(workspace.checkpoints, read_only=True).latest()
    assert latest is not None
    assert latest.step == tiny_config.demo.steps


def test_three_ways_to_save_were_measured(told: tuple[Workspace, Results]) -> None:
    _, results = told
    assert results.measurement is not None
    assert [m.method for m in results.measurement.methods] == ["stager", "torch.save", "dcp.async_save"]
    assert all(sample.nbytes > 0 for method in results.measurement.methods for sample in method.samples)


def test_children_wrote_nothing_to_their_logs_but_what_recovery_did(told: tuple[Workspace, Results]) -> None:
    """Nothing warns on the happy path, dcp.async_save included."""
    workspace, results = told
    logs = {log.parent.name: log.read_text().splitlines() for log in workspace.root.glob("runs/*/log.txt")}
    assert set(logs) == {"measured", *(leg.name for leg in results.legs)}  # this process trained the uninterrupted run
    unexpected = [line for log in logs.values() for line in log if "left by an earlier run" not in line]
    assert unexpected == []
    assert logs["measured"] == logs["killed-1"] == []


def test_report_names_its_files_and_large_ones_are_removed(
    evidence: tuple[Workspace, Results], tiny_config: DemoConfig
) -> None:
    workspace, _ = evidence
    code, printed = judge(evidence, tiny_config)
    assert code == 0
    assert str(workspace.chart) in printed
    assert str(workspace.results) in printed
    assert "NO" not in printed
    assert json.loads(workspace.results.read_text())["ok"] is True
    assert list(workspace.root.glob("runs/*/final.pt")) == []
    assert len(list(Path(workspace.checkpoints).glob("step-*"))) == 3


def test_flipped_bit_in_the_final_weights_is_a_failure(
    evidence: tuple[Workspace, Results], tiny_config: DemoConfig
) -> None:
    workspace, _ = evidence
    flip_a_bit(workspace.run("resumed") / "final.pt", "optimizer", "state", 3, "exp_avg")
    code, printed = judge(evidence, tiny_config)
    assert code == 1
    assert "NOT all shown" in printed
    assert "state['optimizer']['state'][3]['exp_avg']: 1 of" in printed
    assert json.loads(workspace.results.read_text())["ok"] is False
    assert (workspace.run("resumed") / "final.pt").exists()  # the evidence stays


def test_loss_that_differs_in_its_last_bit_is_a_failure(evidence: tuple[Workspace, Results]) -> None:
    _, results = evidence
    losses = results.legs[-1].losses
    *lines, last = losses.read_text().splitlines()
    record = json.loads(last)
    record["bits"] = (float.fromhex(record["bits"]) * (1 + 2**-52)).hex()
    losses.write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    check = check_losses(results.truth, results.legs, record["step"])
    assert not check.ok
    assert check.problems[0].startswith(f"resumed: loss of step {record['step']} is {record['bits']} instead of 0x")


def test_run_that_did_not_reach_the_end_is_a_failure(evidence: tuple[Workspace, Results]) -> None:
    _, results = evidence
    losses = results.legs[-1].losses
    losses.write_text("".join(losses.read_text().splitlines(keepends=True)[:-1]))
    check = check_losses(results.truth, results.legs, 24)
    assert (check.ok, check.problems) == (False, ("resumed ended at step 23 of 24",))


@pytest.mark.long  # the next but one is as long, and is run always
def test_stock_load_finds_weights_that_differ(evidence: tuple[Workspace, Results]) -> None:
    workspace, _ = evidence
    truth = workspace.run("uninterrupted") / "final.pt"
    flip_a_bit(truth, "model", "norm.bias")
    check = check_stock_load(truth, Path(workspace.checkpoints, "step-00000024"))
    assert (check.ok, len(check.problems)) == (False, 1)
    assert check.problems[0].startswith("state['model']['norm.bias']: 1 of 64 elements differ")


@pytest.mark.long
def test_stock_load_of_a_missing_checkpoint_is_a_failure(evidence: tuple[Workspace, Results]) -> None:
    workspace, _ = evidence
    check = check_stock_load(workspace.run("uninterrupted") / "final.pt", Path(workspace.checkpoints, "step-99999999"))
    assert not check.ok
    assert "script that loads with stock PyTorch failed" in check.problems[0]


def test_stock_load_fails_where_stager_is_imported(told: tuple[Workspace, Results], tmp_path: Path) -> None:
    workspace, _ = told
    import stager.demo.stock_load as script

    source = Path(script.__file__).read_text()
    arguments = [str(Path(workspace.checkpoints, "step-00000024")), str(workspace.run("uninterrupted") / "final.pt")]
    arguments.append(str(tmp_path / "loaded.pt"))
    spoilt = "import sys; sys.modules['workers'] = sys\n"
    ended = subprocess.run(
        [sys.executable, "-c", spoilt + source, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert 'assert "workers" not in sys.modules' in ended.stderr or "AssertionError" in ended.stderr


def test_final_state_of_another_structure_is_a_failure(evidence: tuple[Workspace, Results]) -> None:
    workspace, _ = evidence
    other = workspace.run("resumed") / "final.pt"
    state = torch.load(other, weights_only=True)
    del state["rng"]
    torch.save(state, other)
    check = check_final_state(workspace.run("uninterrupted") / "final.pt", other)
    assert (check.ok, check.problems) == (False, ("state['rng']: missing",))


def test_resume_from_another_step_than_the_staged_save_is_a_failure(evidence: tuple[Workspace, Results]) -> None:
    _, results = evidence
    index = next(i for i, leg in enumerate(results.legs) if leg.kill is not None and leg.kill.hit is Aim.WRITING)
    killed, follower = results.legs[index : index + 2]
    assert check_resumes(results.legs).ok
    assert killed.kill is not None
    earlier = Resumed(follower.first.resumed.step - 3)
    follower.ranks = [replace(follower.first, resumed=earlier)]  # the logs of the ranks are not copies
    check = check_resumes(results.legs)
    assert not check.ok
    assert f"expected {killed.kill.step}" in check.problems[0]


def test_worker_left_alive_is_a_failure(evidence: tuple[Workspace, Results]) -> None:
    _, results = evidence
    leg = results.legs[0]
    assert leg.kill is not None
    leg.kill = replace(leg.kill, left=(4321,))
    check = check_workers_gone(results.legs)
    assert not check.ok
    assert "pid 4321 is alive" in check.problems[0]


def test_json_is_all_that_is_printed(told: tuple[Workspace, Results], tiny_config: DemoConfig, tmp_path: Path) -> None:
    _, results = told
    console = quiet()
    elsewhere = Workspace(tmp_path)
    conclude(replace(results, checks=[replace(results.checks[0], ok=False)]), tiny_config, elsewhere, console, True)
    printed = json.loads(text_of(console))
    assert printed == json.loads(elsewhere.results.read_text())
    assert printed["ok"] is False
    assert {"staging", "writing"} >= {kill["hit"] for kill in printed["kills"]} - {None}
    assert printed["lost_time"]["stager"]["samples"][0]["method"] == "stager"
    assert printed["config"]["demo"]["steps"] == tiny_config.demo.steps


def test_directory_with_other_files_is_refused_and_left_alone(tiny_config: DemoConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        run_demo(tiny_config, tmp_path, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_an_earlier_demo_left_is_removed(tiny_config: DemoConfig, tmp_path: Path) -> None:
    first = Workspace.prepare(tmp_path / "out", tiny_config)
    Path(first.checkpoints, "step-00000003").mkdir(parents=True)
    (first.run("resumed") / "final.pt").write_text("old")
    (first.root / "notes.txt").write_text("the user's")
    Workspace.prepare(tmp_path / "out", tiny_config)
    assert {path.name for path in first.root.iterdir()} == {"demo-config.json", "measured", "notes.txt"}


def test_too_little_free_space_is_refused_with_the_numbers(tmp_path: Path) -> None:
    huge = DemoConfig.model_validate({"demo": {"n_embd": 1 << 20}})
    with pytest.raises(OSError, match=r"the demo writes up to .* here and .* are free"):
        run_demo(huge, tmp_path, quiet())
    assert list(tmp_path.iterdir()) == []
