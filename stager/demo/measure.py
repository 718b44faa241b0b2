"""The measuring process: what a save costs the training loop, with stager, torch.save and dcp.async_save.

One process, one model.  Stretches of training without a save and stretches with one at their start take turns, and
so do the three ways to save, so that whatever else the machine does falls on all of them alike.  What a save cost is
what its stretch took beyond the same number of steps of the stretches before and after it.

Run as ``python -m stager.demo.measure --config FILE --directory DIR --events FIFO``.
"""

from __future__ import annotations

import argparse
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.state_dict_saver import async_save

from stager import Checkpointer
from stager.demo.config import DemoConfig
from stager.demo.events import EventWriter, MeasuredSave, Stretch
from stager.demo.train import TrainingRun

MAX_STEPS_WAITED = 10_000  # a save that is not done after as many steps will not be


@dataclass(frozen=True)
class Saver:
    """One way to save the state of a training run.

    Attributes:
        save: begins to save as a given step; its Future is done when the method calls the save complete.
        directory, pattern: where what was saved is.
    """

    method: str
    save: Callable[[int], Future[Any]]
    directory: Path
    pattern: str

    def discard(self) -> int:
        """Remove what was saved, so that no write-back of it falls on the next stretch; returns its bytes."""
        nbytes = 0
        for path in list(self.directory.glob(self.pattern)):
            nbytes += sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return nbytes


def make_savers(run: TrainingRun, checkpointer: Checkpointer, directory: Path) -> list[Saver]:
    """Return the three ways to save.

    ``Checkpointer.save`` is complete when the checkpoint is written, synced and committed.  ``torch.save`` is complete
    when the call returns: the bytes are in the page cache.  ``dcp.async_save`` is complete when its Future says so.
    """

    def save_with_torch(step: int) -> Future[None]:
        torch.save({name: value.state_dict() for name, value in run.state.items()}, directory / "torch.pt")
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def save_with_dcp(step: int) -> Future[Any]:
        future: Future[Any] = async_save(run.state, checkpoint_id=str(directory / "dcp"))  # type: ignore[assignment]  # without a stager of ours it is a Future
        return future

    checkpointer.guard(run.optimizer)
    return [
        Saver("stager", lambda step: checkpointer.save(step, run.state).upload_completion, directory, "stager/step-*"),
        Saver("torch.save", save_with_torch, directory, "torch.pt"),
        Saver("dcp.async_save", save_with_dcp, directory, "dcp"),
    ]


class _Watched(NamedTuple):
    """A stretch of training with a save at its start."""

    num_steps: int
    secs: float
    blocked_secs: float
    done_secs: float


class Meter:
    """Trains in stretches, with a save and without, and counts the steps."""

    def __init__(self, run: TrainingRun, steps_per_stretch: int) -> None:
        self._run = run
        self._steps_per_stretch = steps_per_stretch
        self._step = 0

    def train(self) -> Stretch:
        """A stretch without a save."""
        started = time.perf_counter()
        for _ in range(self._steps_per_stretch):
            self._run.train_step()
        return Stretch(self._steps_per_stretch, time.perf_counter() - started)

    def train_and_save(self, saver: Saver) -> _Watched:
        """A stretch with a save at its start, as long as the others at least and until the save is complete."""
        self._step += 1
        done_at: list[float] = []
        started = time.perf_counter()
        future = saver.save(self._step)
        blocked_secs = time.perf_counter() - started
        future.add_done_callback(lambda _: done_at.append(time.perf_counter()))
        num_steps = 0
        while num_steps < self._steps_per_stretch or not future.done():
            if num_steps == MAX_STEPS_WAITED:
                raise TimeoutError(f"{saver.method}: a save is not complete after {num_steps} training steps")
            self._run.train_step()
            num_steps += 1
        secs = time.perf_counter() - started
        future.result()
        return _Watched(num_steps, secs, blocked_secs, done_at[0] - started)


def measure(meter: Meter, savers: Sequence[Saver], num_saves: int) -> Iterator[Stretch | MeasuredSave]:
    """Stretches without a save and with one in turns, ``num_saves`` of each saver.  The first save of each is not
    counted: what happens only once is not what a save costs."""
    for saver in savers:
        meter.train_and_save(saver)
        saver.discard()
    before = meter.train()
    yield before
    for turn in range(num_saves):
        for position in range(len(savers)):
            saver = savers[(turn + position) % len(savers)]  # each comes first, second and third in turn
            watched = meter.train_and_save(saver)
            nbytes = saver.discard()
            after = meter.train()
            yield after
            step_secs = (before.secs + after.secs) / (before.num_steps + after.num_steps)
            yield MeasuredSave(
                saver.method,
                watched.blocked_secs,
                watched.secs - watched.num_steps * step_secs,
                watched.done_secs,
                watched.num_steps,
                step_secs,
                nbytes,
            )
            before = after


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in this process, and report to the demo."""
    parser = argparse.ArgumentParser(prog="python -m stager.demo.measure", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a DemoConfig as JSON")
    parser.add_argument("--directory", type=Path, required=True, help="where checkpoints are written and removed")
    parser.add_argument("--events", required=True, help="the FIFO that the demo reads")
    arguments = parser.parse_args(argv)

    # dcp.async_save says on every save that there is no process group; here that is meant.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    config = DemoConfig.model_validate_json(arguments.config.read_bytes())
    events = EventWriter(arguments.events)
    run = TrainingRun(config.demo)
    run.train_step()  # AdamW creates its state in its first step
    with Checkpointer(arguments.directory / "stager", config=config) as checkpointer:
        checkpointer.warmup(run.state)
        savers = make_savers(run, checkpointer, arguments.directory)
        for result in measure(Meter(run, config.demo.measure_steps), savers, config.demo.measure_saves):
            events.send(result)
    events.close()


if __name__ == "__main__":
    main()
