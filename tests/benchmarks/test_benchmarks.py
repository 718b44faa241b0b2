"""The benchmark runs, tiny, so that it keeps running. Its times are looked at by nobody here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from tests import forked_subprocess
from tests.benchmarks import launch as launch_module
from tests.benchmarks.__main__ import bench
from tests.benchmarks.cases import CASES, Kind
from tests.benchmarks.child import failure_of
from tests.benchmarks.job import Job
from tests.benchmarks.launch import ROOT, launch, read_records
from tests.benchmarks.options import Options
from tests.benchmarks.records import (
    Descriptors,
    Finished,
    Load,
    Memory,
    Opened,
    Outcome,
    Ready,
    Save,
    SoakPoint,
    Speed,
    State,
    Stretch,
    to_line,
)
from tests.benchmarks.results import Results, Row
from tests.benchmarks.run import run

SCALE = 0.001


@pytest.fixture(autouse=True)
def children_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """But those whose memory is looked at: pages shared with the fork server are slow to count."""

    def popen(arguments: list[str], **options: Any) -> Any:
        job = json.loads(arguments[-1])
        fresh = job["measure"] == "memory" or job["case"] == "soak"
        return (subprocess if fresh else forked_subprocess).Popen(arguments, **options)

    monkeypatch.setattr(launch_module, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))


def _options(directory: Path, case: str, *peers: str, memory: bool = False) -> Options:
    return Options(
        directory=directory,
        rounds=1,
        scale=SCALE,
        saves=2,
        cases=(case,),
        peers=peers,
        memory=memory,
        pairs=2,
        stretch_steps=1,
        soak_saves=22,
        alone_secs=0.01,
    )


def _run(options: Options) -> dict[str, Row]:
    finished: list[str] = []
    results = run(options, lambda _: None, lambda _, case: finished.append(case.name))
    assert finished == [*options.cases]
    return results.cases[options.cases[0]].rows


def test_case_of_saves_has_every_figure_of_times_and_memory(tmp_path: Path) -> None:
    rows = _run(_options(tmp_path, "big", "stager", memory=True))
    row = rows["stager"]
    assert (row.outcome, row.message) == ("ok", "")
    assert [(save.round, save.index) for save in row.of(Save)] == [(0, 0), (0, 1), (0, 2)]
    for save in row.of(Save):
        assert 0 < save.blocked_secs <= save.staged_secs <= save.stored_secs
        assert min(save.limits.memcpy_secs, save.limits.memcpy_threads_secs, save.limits.write_secs) > 0
    for kind in (Opened, Load, Descriptors, Ready, Memory):
        assert len(row.of(kind)) == 1
    assert all(speed.alone_per_sec > 0 and speed.saving_per_sec > 0 for speed in row.of(Speed))
    (memory,) = row.of(Memory)
    assert memory.num_readings > 0
    assert memory.peak_bytes >= memory.base_bytes > 0
    assert {state.num_tensors for state in row.of(State)} == {72}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("case", "peer"), [("small", "torch-checkpointing"), ("many", "torch-save")])
def test_peer_that_may_fail_or_not_be_there_is_a_row(tmp_path: Path, case: str, peer: str) -> None:
    row = _run(_options(tmp_path, case, peer))[peer]
    outcome = Outcome(row.outcome)
    assert bool(row.of(Finished)) == (outcome is Outcome.OK)
    assert bool(row.message) == (outcome is not Outcome.OK)


def test_training_loop_pairs_stretches(tmp_path: Path) -> None:
    row = _run(_options(tmp_path, "loop", "stager-guarded"))["stager-guarded"]
    assert row.outcome == "ok"
    assert [stretch.pair for stretch in row.of(Stretch)] == [0, 1]
    for stretch in row.of(Stretch):
        assert min(stretch.without_secs, stretch.with_secs, stretch.compute_secs, stretch.memcpy_threads_secs) > 0


@pytest.mark.long
def test_soak_has_points_after_twenty_and_at_the_end(tmp_path: Path) -> None:
    row = _run(_options(tmp_path, "soak", "stager"))["stager"]
    assert row.outcome == "ok"
    assert {20, 22} <= {point.saves for point in row.of(SoakPoint)}
    assert all(point.pss_bytes > 0 and point.trainer_fds > 0 for point in row.of(SoakPoint))


def test_program_prints_every_case_and_writes_its_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "tests.benchmarks", "--rounds", "1", "--saves", "2", "--scale", str(SCALE)]
    arguments += ["--no-memory", "--case", "lora", "--peer", "torch-save"]
    arguments += ["--out", str(out), "--directory", str(tmp_path / "work")]
    printed = forked_subprocess.run(arguments, check=True, cwd=ROOT).stdout
    results = Results.load(out / "results.json")
    assert set(results.cases) == {"lora"}
    assert results.cases["lora"].rows["torch-save"].outcome == "ok"
    assert results.versions.packages["torch"] in (out / "results.md").read_text()
    assert {path.name for path in out.iterdir()} - {"lora.png"} == {"results.json", "results.md"}
    for text in ("lora: ", "What stager promises"):
        assert text in printed
    assert str(tmp_path) not in (out / "results.json").read_text()


# -- a child that goes wrong -------------------------------------------------------------------------------------


def _job(tmp_path: Path, **changes: object) -> Job:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    job = Job(
        case="big",
        peer="stager",
        measure="times",
        round=0,
        scale=SCALE,
        seed=0,
        saves=2,
        cap_secs=60,
        pairs=1,
        stretch_steps=1,
        soak_saves=2,
        alone_secs=0.01,
        directory=str(directory),
        records=str(tmp_path / "records"),
    )
    return replace(job, **changes)


@pytest.mark.long
@pytest.mark.remains
def test_child_over_its_deadline_is_killed_with_all_it_started(tmp_path: Path) -> None:
    """This soak never ends by itself; the leak check of this suite looks for processes that are left."""
    job = _job(tmp_path, case="soak", soak_saves=1_000_000)
    launched = launch(job, deadline_secs=6)
    assert launched.failure is not None
    assert launched.failure.outcome == Outcome.DEADLINE.value


def test_records_survive_a_kill_but_for_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text(to_line(Ready(5)) + to_line(State(6, 7)) + to_line(Finished())[:-3])
    assert read_records(path) == [Ready(5), State(6, 7)]


def test_child_that_raises_is_a_failure_with_its_message(tmp_path: Path) -> None:
    job = _job(tmp_path, peer="torch-save", directory="/proc/nowhere")
    launched = launch(job, deadline_secs=100)
    assert launched.failure is not None
    assert launched.failure.outcome == Outcome.FAILED.value
    assert "FileNotFoundError" in launched.failure.message
    assert not any(isinstance(record, Finished) for record in launched.records)


def test_missing_module_of_the_peer_means_not_installed_and_any_other_does_not(tmp_path: Path) -> None:
    job = _job(tmp_path, peer="torchsnapshot")
    missing = failure_of(job, ModuleNotFoundError("No module", name="torchsnapshot"))
    assert (missing.outcome, missing.message) == (Outcome.NOT_INSTALLED.value, "torchsnapshot is not installed")
    assert failure_of(job, ModuleNotFoundError("No module", name="else")).outcome == Outcome.FAILED.value


def test_program_maps_none_of_torchs_libraries() -> None:
    """It would take its share of them in the memory that it reads of its children."""
    script = "import sys, tests.benchmarks.program; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_peer_of_a_case_is_known_and_every_kind_has_a_case() -> None:
    from tests.benchmarks.peers import PEERS
    from tests.gpu.__main__ import PEERS as PEERS_ON_DEVICES

    assert {case.kind for case in CASES.values()} == set(Kind)
    assert {peer for case in CASES.values() for peer in case.peers} | {*PEERS_ON_DEVICES} == set(PEERS)


@pytest.mark.parametrize("what", ["case", "peer"])
def test_unknown_case_or_peer_is_wrong_usage(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_info:
        bench(**{what: ["nonsense"]})
    assert exit_info.value.exit_code == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.long
def test_every_peer_runs_on_every_case(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "tests.benchmarks", "--rounds", "1", "--saves", "2", "--scale", str(SCALE)]
    arguments += ["--pairs", "2", "--soak-saves", "40", "--out", str(out), "--directory", str(tmp_path / "work")]
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    for name, case in json.loads((out / "results.json").read_text())["cases"].items():
        assert set(case["rows"]) == set(CASES[name].peers)
