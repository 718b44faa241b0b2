"""A short run of `stager stress`: fixed episodes with one kind of fault after the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stager.stress.config import StressConfig
from stager.stress.disk import SmallDisk
from stager.stress.episode import Episode, RunPlan
from stager.stress.fault_kinds import Damage, FullDisk, PointFault, Pressure, RemovePartial, SignalFault
from stager.stress.record import EpisodeResult, FaultResult
from stager.stress.run import Stage
from tests.stress.plans import config, episode, training

CONFIG = StressConfig()


def play(stage: Stage, plan: Episode) -> tuple[EpisodeResult, dict[str, FaultResult]]:
    """The result, which must hold no violation, and what came of each fault."""
    result = stage.play(plan, CONFIG)
    assert not result.violations, result.violations
    assert not os.path.exists(stage.out / f"episode-{plan.number:05d}")
    return result, {outcome.fault.label: outcome.outcome for outcome in result.outcomes}


@pytest.mark.long
def test_trainer_killed_after_staging_then_its_last_checkpoint_damaged(stage: Stage) -> None:
    killed = RunPlan(8, faults=(PointFault("save.handed-over", "kill", after=3),), peek_at=2, hurried=True)
    damaged = RunPlan(10, faults=(Damage("flip", newest=True, file=0.4, place=0.5),))
    result, outcomes = play(stage, episode(killed, damaged, number=1))
    assert outcomes["SIGKILL at save.*"] in (FaultResult.FINISHED, FaultResult.COMMITTED)  # as fast as the worker was
    assert outcomes["a bit flipped in a checkpoint"] is FaultResult.FELL_BACK
    assert result.num_saves > 10  # the damaged step was saved again


@pytest.mark.long
def test_workers_that_crash_and_stop_in_the_middle_of_a_save(stage: Stage) -> None:
    faults = (PointFault("commit.indexed", "segv"), PointFault("part.write", "stop", 4))
    settings = config(2, workers={"task_timeout_secs": 4.0}, persistence={"fsync": False})
    _, outcomes = play(stage, episode(RunPlan(6, faults=faults), number=2, config=settings, guard=False))
    assert set(outcomes.values()) == {FaultResult.MOVED}


@pytest.mark.long
def test_storage_errors_are_reported_and_the_next_save_works(stage: Stage) -> None:
    faults = (PointFault("part.write", "errno", 1, "ENOSPC"), PointFault("commit.begin", "errno", 2, "EIO"))
    vanishing = (RemovePartial(4), PointFault("part.opened", "delay", 4, "0.4"))
    result, outcomes = play(stage, episode(RunPlan(9, faults=(*faults, *vanishing)), number=3, step_secs=0.01))
    assert outcomes["ENOSPC at part.*"] is outcomes["EIO at commit.*"] is FaultResult.REPORTED
    assert outcomes["partial directory removed"] in (
        FaultResult.REPORTED,
        FaultResult.COMMITTED,
    )  # whatever was seen first
    assert 2 <= result.num_failed <= 3 and result.num_committed == 9 - result.num_failed


@pytest.mark.long
def test_trainer_that_is_terminated_saves_once_more_and_one_that_ends_without_a_word(stage: Stage) -> None:
    told = SignalFault("trainer", "SIGTERM", save=2, delay_secs=0.0)
    first = RunPlan(200, on_term="save", faults=(told,), ending="exit")
    second = RunPlan(201, ending="close", faults=(Pressure(1, 16 << 20, 0.1),))
    plan = episode(first, second, number=4, save_every=50, step_secs=0.002, training=training(optimizer="sgd"))
    result, outcomes = play(stage, plan)
    assert outcomes["SIGTERM to the trainer"] in (FaultResult.COMMITTED, FaultResult.DISCARDED)
    assert result.num_runs == 2


@pytest.mark.long
def test_disk_that_is_full_for_a_while(stage: Stage, tmp_path: Path) -> None:
    try:
        SmallDisk(str(tmp_path / "probe"), 1 << 20).unmount()
    except OSError as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    full = FullDisk(save=2, free_bytes=8 << 10, secs=600.0)
    settings = config(persistence={"check_free_space": False})
    plan = episode(RunPlan(12, faults=(full,)), number=5, small_disk=True, config=settings, step_secs=0.05)
    result, outcomes = play(stage, plan)
    assert outcomes == {"full disk": FaultResult.REPORTED}
    assert result.num_failed >= 1 and result.num_committed >= 2
