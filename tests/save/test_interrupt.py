"""Ctrl-C in ``save()``, in a program that catches it and goes on: what is committed is still right."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from stager import Checkpointer
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.faults import Faults


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _press_when_held(hold: object) -> threading.Thread:
    def press() -> None:
        hold.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@pytest.mark.parametrize("point", ["save.copied", "save.handed-over"])
def test_interrupted_save_is_finished_and_its_buffer_is_not_given_away(
    run_dir: Path, faults: Faults, point: str
) -> None:
    """1. the hand-over is held 2. Ctrl-C in the trainer's thread 3. it goes on and saves more, with every buffer."""
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        hold = faults.hold(point)
        pressing = _press_when_held(hold)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1, {"x": torch.full((100_000,), 1.0)})
        pressing.join()
        hold.release()
        handles = [ckpt.save(step, {"x": torch.full((100_000,), float(step))}) for step in (2, 3, 4)]
        wait([handle.upload_completion for handle in handles])  # the one worker has done step 1 before them
        for step in (1, 2, 3, 4):
            loaded = ckpt.load(step)
            assert loaded is not None and torch.all(loaded.state["x"] == step)


def test_interrupted_snapshot_in_pieces_reads_the_state_no_more_and_fails_as_a_whole(
    run_dir: Path, faults: Faults
) -> None:
    """1. the first piece's part is held with both buffers full 2. Ctrl-C 3. the state changes 4. the worker goes on."""
    config = {"workers": {"count": 1}, "arena": {"max_host_bytes": 2 << 20}}
    state = {"x": torch.full((2_000_000,), 1.0)}
    with Checkpointer(run_dir, config) as ckpt:
        hold = faults.hold("part.write")
        pressing = _press_when_held(hold)
        releasing = threading.Thread(target=lambda: (pressing.join(), hold.release()))
        releasing.start()
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1, state)
        releasing.join()
        state["x"].fill_(2.0)
        ckpt.save(2, state).upload_completion.result()  # the one worker has done what is left of step 1 before it
        committed = ckpt.checkpoints()
        for info in committed:
            assert verify_checkpoint(info.path).ok
            loaded = ckpt.load(info.step)
            assert loaded is not None and torch.all(loaded.state["x"] == info.step)
        assert 2 in [info.step for info in committed]
