"""Trainings in frameworks: the scripts of ``docs/integrations``, run to the end, killed, and resumed.

A page has one script, its first block of Python that defines ``main``. It is run as ``python train.py OUT``, trains for some
steps, saves into OUT as the framework does, resumes from there by the framework's own means if something is there, and ends
with ``torch.save(..., "OUT/final.pt")`` of everything that training has made: parameters, optimizer, random numbers.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults import Faults
from tests.states import same

PAGES = Path(__file__).parents[2] / "docs" / "integrations"
_SECS = 240
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


@dataclass(frozen=True)
class Ended:
    """A script that has ended: its exit code, negative for a signal, and what it printed."""

    returncode: int
    output: str


@dataclass(frozen=True)
class Training:
    """A script, and where it is run.

    Attributes:
        script: path of the file.
        num_ranks: more than one: by torchrun.
        environment: beside this process's.
    """

    script: Path
    num_ranks: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    def run(self, out: Path, *arguments: object, check: bool = True) -> Ended:
        """Run it, and wait for its end.

        Args:
            out: what it writes into.
            check: fail if it does not exit with 0.
        """
        launcher = (
            []
            if self.num_ranks == 1
            else [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={self.num_ranks}",
                "--log-dir",
                os.devnull,
            ]
        )
        command = [sys.executable, *launcher, str(self.script), str(out), *map(str, arguments)]
        environment = {**os.environ, **_QUIET, **dict(self.environment)}
        # In a session of its own, so that nothing of it is left when it takes too long.
        with subprocess.Popen(
            command,
            cwd=self.script.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=_SECS)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        ended = Ended(process.returncode, output)
        assert not check or ended.returncode == 0, f"{command}: {ended.returncode}\n{output[-6000:]}"
        return ended

    def killed(self, out: Path, faults: Faults, point: str, after: int, *arguments: object) -> Ended:
        """Run it until it is killed at a point of ``stager/workers/faults.py``, as by SIGKILL from outside."""
        faults.arm(point, f"kill after={after}")
        ended = self.run(out, *arguments, check=False)
        assert faults.fired(point), (
            f"it ended with {ended.returncode} and never came to {point}\n{ended.output[-6000:]}"
        )
        assert ended.returncode != 0, "it was killed, and ended well"
        assert not (out / "final.pt").exists()
        return ended


def page_script(page: str, directory: Path) -> Path:
    """Write the script of a page of ``docs/integrations`` into a directory; return its path."""
    text = (PAGES / f"{page}.md").read_text()
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (source, *_) = [block for block in blocks if "def main(" in block]
    path = directory / "train.py"
    path.write_text(source)
    return path


def final(out: Path) -> Any:
    """What a training has made."""
    return torch.load(out / "final.pt", weights_only=False)


def resumes_bit_equal(
    training: Training, directory: Path, faults: Faults, point: str, after: int, workers_point: str | None = None
) -> str:
    """Train without interruption; train, be killed at a point, and resume; compare. Returns what the resumed run printed.

    Args:
        point: where the trainer is killed.
        after: so many visits of it pass first.
        workers_point: where a worker is killed before, the second time that it comes there. None: none is.
    """
    whole, broken = directory / "whole", directory / "broken"
    training.run(whole)
    if workers_point is not None:
        faults.arm(workers_point, "kill after=1")  # where the trainer dies first, a worker of the resumed run is killed
    training.killed(broken, faults, point, after)
    resumed = training.run(broken)
    assert workers_point is None or faults.fired(workers_point)
    assert same(final(whole), final(broken)), "the resumed run has made something else than the uninterrupted one"
    return resumed.output


def resumes_from_any_point(training: Training, directory: Path, faults: Faults, point: str, after: int) -> str:
    """Do as :func:`resumes_bit_equal`. At a point of a worker, that is killed first, and the trainer when it saves again."""
    if point.startswith("save."):
        return resumes_bit_equal(training, directory, faults, point, after)
    return resumes_bit_equal(training, directory, faults, "save.handed-over", after, workers_point=point)
