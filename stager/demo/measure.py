"""The measuring child: what a save costs the training loop, with stager, torch.save and dcp.async_save.

One process, one model.  Stretches of training without a save and stretches with one at their start take turns, and
so do the three ways to save, so that whatever else the machine does falls on all of them alike.  What a save cost is
what its stretch took beyond the same number of steps of the stretches before and after it.

Run as ``python -m stager.demo.measure --config FILE --directory DIR --events-fd FD``.
"""

from __future__ import annotations

import argparse
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.checkpoint.state_dict_saver import async_save

from stager import Checkpointer, CheckpointInfo
from stager.demo.config import DemoConfig
from stager.demo.events import EventWriter, MeasuredSave, Stretch
from stager.demo.train import TrainingRun

STAGER, TORCH_SAVE, DCP_ASYNC_SAVE = "stager", "torch.save", "dcp.async_save"
METHODS = (STAGER, TORCH_SAVE, DCP_ASYNC_SAVE)

MAX_STEPS_WAITED = 10_000  # a save that is not done after as many steps will not be


class Saver(Protocol):
    """One way to save the state of a training run."""

    method: str

    def save(self, step: int, run: TrainingRun) -> Future[Any]:
        """Save; the Future is done when the method calls the save complete."""

    def discard(self) -> int:
        """Remove what was saved, so that no write-back of it falls on the next stretch; returns its bytes."""


class StagerSaver:
    """``Checkpointer.save``: complete when written, synced and committed."""

    method = STAGER

    def __init__(self, checkpointer: Checkpointer, run: TrainingRun) -> None:
        self._checkpointer = checkpointer
        self._checkpointer.guard(run.optimizer)
        self._saved: Future[CheckpointInfo] | None = None

    def save(self, step: int, run: TrainingRun) -> Future[CheckpointInfo]:
        self._saved = self._checkpointer.save(step, run.state).upload_completion
        return self._saved

    def discard(self) -> int:
        assert self._saved is not None  # nothing to discard before the first save
        return _remove(Path(self._saved.result().path))


class TorchSaver:
    """``torch.save``: complete when the call returns, handed to the page cache and not synced."""

    method = TORCH_SAVE

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, step: int, run: TrainingRun) -> Future[None]:
        torch.save({name: value.state_dict() for name, value in run.state.items()}, self._path)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def discard(self) -> int:
        return _remove(self._path)


class AsyncSaver:
    """``dcp.async_save`` as it comes, in its thread: complete when its Future says so."""

    method = DCP_ASYNC_SAVE

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, step: int, run: TrainingRun) -> Future[Any]:
        future: Future[Any] = async_save(run.state, checkpoint_id=str(self._directory))  # type: ignore[assignment]  # without a stager of ours it is a Future
        return future

    def discard(self) -> int:
        return _remove(self._directory)


def _remove(path: Path) -> int:
    """Remove a file or a directory of files; returns the bytes that were in it."""
    if path.is_file():
        nbytes = path.stat().st_size
        path.unlink()
        return nbytes
    nbytes = sum(file.stat().st_size for file in path.iterdir())
    shutil.rmtree(path)
    return nbytes


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
        future = saver.save(self._step, self._run)
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
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(prog="python -m stager.demo.measure", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a DemoConfig as JSON")
    parser.add_argument("--directory", type=Path, required=True, help="where checkpoints are written and removed")
    parser.add_argument("--events-fd", type=int, required=True, help="the write end of the parent's pipe")
    arguments = parser.parse_args(argv)

    # dcp.async_save says on every save that there is no process group; here that is meant.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    config = DemoConfig.model_validate_json(arguments.config.read_bytes())
    events = EventWriter(arguments.events_fd)
    run = TrainingRun(config.demo)
    run.train_step()  # AdamW creates its state in its first step
    with ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(arguments.directory / "stager", config=config))
        checkpointer.warmup(run.state)
        savers: list[Saver] = [
            StagerSaver(checkpointer, run),
            TorchSaver(arguments.directory / "torch.pt"),
            AsyncSaver(arguments.directory / "dcp"),
        ]
        for result in measure(Meter(run, config.demo.measure_steps), savers, config.demo.measure_saves):
            events.send(result)


if __name__ == "__main__":
    main()
