"""SIGKILL of the trainer: what is visible afterwards is whole, what was staged is there, nobody lives on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from stager import Checkpointer
from tests.crash.trainer import value_of
from tests.leaks import worker_processes
from workers.verify import verify_checkpoint

_NBYTES = 64 << 20
_LAST_WORKER_SECS = 10


def start(run_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.crash.trainer", str(run_dir), str(_NBYTES)], stdout=subprocess.PIPE, text=True
    )


def wait_for_workers_to_end() -> None:
    deadline = time.monotonic() + _LAST_WORKER_SECS
    remaining = [psutil.Process(pid) for pid in worker_processes() if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(remaining, timeout=max(0.0, deadline - time.monotonic()))
    assert not alive, f"workers alive {_LAST_WORKER_SECS} s after their trainer was killed: {alive}"


def check(run_dir: Path, reported: list[str]) -> int:
    """Whatever a new process finds newest verifies and holds its own values; returns its step, -1 for none."""
    with Checkpointer(run_dir) as ckpt:
        latest = ckpt.latest()
        if latest is None:
            assert not any(line.startswith("staged") for line in reported)
            return -1
        assert not ckpt.skipped
        result = verify_checkpoint(latest.path)
        assert result.ok, result.problems
        loaded = ckpt.load(latest.step)
    assert loaded is not None
    for name, tensor in loaded.state.items():
        assert torch.equal(tensor, torch.full_like(tensor, value_of(latest.step, name)))
    staged = [int(line.split()[1]) for line in reported if line.startswith("staged")]
    assert latest.step >= max(staged, default=-1), "a staged checkpoint was lost"
    return latest.step


def killed_at_random(run_dir: Path, rng: random.Random) -> int:
    with start(run_dir) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "up\n"
        try:
            trainer.wait(timeout=rng.uniform(0.0, 1.5))  # a random moment, not an order of events
        except subprocess.TimeoutExpired:
            trainer.send_signal(signal.SIGKILL)
        reported = trainer.stdout.read().splitlines()
    assert trainer.returncode == -signal.SIGKILL
    wait_for_workers_to_end()
    return check(run_dir, reported)


def test_trainer_killed_at_random_moments(run_dir: Path) -> None:
    rng = random.Random(1)
    steps = [killed_at_random(run_dir, rng) for _ in range(4)]
    assert steps == sorted(steps)  # each run goes on from where the one before was


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_trainer_killed_at_50_random_moments(run_dir: Path) -> None:
    rng = random.Random(2)
    steps = [killed_at_random(run_dir, rng) for _ in range(50)]
    assert steps == sorted(steps)
    print(f"50 kills, newest step after each: {steps}")


def test_trainer_killed_right_after_staging_still_commits(run_dir: Path) -> None:
    with start(run_dir) as trainer:
        assert trainer.stdout is not None
        reported = []
        for line in trainer.stdout:
            reported.append(line)
            if line == "staged 1\n":
                trainer.send_signal(signal.SIGKILL)
                break
        reported += trainer.stdout.readlines()
    wait_for_workers_to_end()
    assert check(run_dir, reported) >= 1


def test_forgotten_close_loses_nothing(run_dir: Path) -> None:
    script = (
        "import sys, torch\n"
        "from stager import Checkpointer\n"
        "ckpt = Checkpointer(sys.argv[1])\n"
        "ckpt.save(5, {'x': torch.arange(1000)})\n"
    )
    subprocess.run([sys.executable, "-c", script, str(run_dir)], check=True)
    with Checkpointer(run_dir, read_only=True) as reader:
        latest = reader.latest()
        assert latest is not None and latest.step == 5
