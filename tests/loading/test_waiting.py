"""load() and latest() wait for the saves in flight: what was saved last is what is found."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, CheckpointNotFoundError, UsageError, load_checkpoint
from stager.saving.saver import Saver
from stager.workers import long_wait
from tests.faults import Faults
from tests.states import same
from tests.waiting import wait_until_blocked

FAST = {"workers": {"count": 1}, "persistence": {"fsync": False}}


def state_of(step: int) -> dict[str, Any]:
    return {"x": torch.full((5,), float(step))}


LOOKS: dict[str, Callable[[Checkpointer], Any]] = {
    "load": lambda ckpt: ckpt.load().step,  # type: ignore[union-attr]  # there is one
    "load a step": lambda ckpt: ckpt.load(3).step,  # type: ignore[union-attr]  # there is one
    "load into": lambda ckpt: ckpt.load(into={"x": torch.zeros(5)}).step,  # type: ignore[union-attr]  # there is one
    "latest": lambda ckpt: ckpt.latest().step,  # type: ignore[union-attr]  # there is one
    "latest_step": lambda ckpt: ckpt.latest_step(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_was_saved_last_is_found(run_dir: Path, faults: Faults, look: Callable[[Checkpointer], Any]) -> None:
    """1. the worker is held while it writes step 3. 2. the main thread waits for that. 3. the worker goes on."""
    with Checkpointer(run_dir, FAST) as ckpt:
        hold = faults.hold("part.write")
        ckpt.save(3, state_of(3))
        hold.wait()
        found: list[Any] = []
        looking = threading.Thread(target=lambda: found.append(look(ckpt)))
        looking.start()
        wait_until_blocked(looking, Saver.wait_for_saves)
        hold.release()
        looking.join()
        assert found == [3]


def test_without_waiting_what_is_not_committed_is_not_there(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, FAST) as ckpt:
        hold = faults.hold("part.write")
        handle = ckpt.save(3, state_of(3))
        hold.wait()
        assert (
            ckpt.load(wait=False) is None and ckpt.latest(wait=False) is None and ckpt.latest_step(wait=False) is None
        )
        with pytest.raises(CheckpointNotFoundError, match=r"step 3 \(its save was not committed, or"):
            ckpt.load(3, wait=False)
        hold.release()
        handle.upload_completion.result()
        loaded = ckpt.load(wait=False)
        assert loaded is not None and same(loaded.state, state_of(3))


def test_save_that_fails_leaves_the_one_before_and_its_error_unread(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, {**FAST, "workers": {"count": 1, "max_restarts": 0}}) as ckpt:
        ckpt.save(1, state_of(1)).upload_completion.result()
        faults.arm("part.write", "raise")
        handle = ckpt.save(3, state_of(3))
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 1
        with pytest.raises(Exception, match=r"."):
            ckpt.save(4, state_of(4))
        assert handle.upload_completion.exception() is not None


def test_callback_cannot_wait_for_itself_and_may_look(run_dir: Path, faults: Faults) -> None:
    seen: list[Any] = []

    def callback(_: object) -> None:
        try:
            seen.append((ckpt.latest_step(), load_checkpoint(run_dir / "step-00000003").step))
            ckpt.load()
        except UsageError as error:
            seen.append(str(error))

    with Checkpointer(run_dir, FAST) as ckpt:
        hold = faults.hold("part.write")
        handle = ckpt.save(3, state_of(3))
        called = threading.Event()
        handle.upload_completion.add_done_callback(lambda future: (callback(future), called.set()))
        hold.wait()
        hold.release()
        called.wait()
    assert seen[0] == (3, 3) and "would wait for that callback for ever" in seen[1] and "load_checkpoint()" in seen[1]


def test_long_wait_for_a_save_says_so(
    run_dir: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(long_wait, "LONG_SECS", 0.0)
    said = threading.Event()
    monkeypatch.setattr(long_wait.LongWait, "tick", lambda self, tick=long_wait.LongWait.tick: (tick(self), said.set()))
    with Checkpointer(run_dir, FAST) as ckpt:
        hold = faults.hold("part.write")
        ckpt.save(3, state_of(3))
        hold.wait()
        looking = threading.Thread(target=ckpt.load)
        with caplog.at_level(logging.WARNING, "stager"):
            looking.start()
            said.wait()
            hold.release()
            looking.join()
    assert "waiting for the save of step 3 to be committed, without a time limit" in caplog.messages
