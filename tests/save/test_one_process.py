"""One process that makes a second Checkpointer on a directory: it takes over from garbage, or fails at once."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, DirectoryInUseError
from tests.faults import Faults
from tests.states import same

CONFIG = {"workers": {"count": 1}, "persistence": {"fsync": False, "lock_timeout_secs": 600}}
STATE = {"x": torch.arange(5.0)}


def test_second_one_fails_at_once_and_says_where_the_first_was_made(run_dir: Path, tmp_path: Path) -> None:
    """It does not wait for the lock: the time limit is ten minutes."""
    with Checkpointer(run_dir, CONFIG) as first:
        (tmp_path / "link").symlink_to(run_dir)
        for path in (run_dir, tmp_path / "link"):
            with pytest.raises(
                DirectoryInUseError, match=rf"this process has it open already.*{__file__}:\d+; .*close\(\)"
            ):
                Checkpointer(path, CONFIG)
        with Checkpointer(run_dir, read_only=True) as reader:
            assert reader.latest() is None
        first.save(1, STATE).upload_completion.result()  # it goes on as before
    with Checkpointer(run_dir, CONFIG) as second:
        assert second.latest_step() == 1


def test_cell_of_a_notebook_that_is_run_twice(run_dir: Path) -> None:
    cell = compile("ckpt = Checkpointer(run_dir, config)", "<cell 3>", "exec")
    names: dict[str, Any] = {"Checkpointer": Checkpointer, "run_dir": run_dir, "config": CONFIG}
    exec(cell, names)
    with pytest.raises(DirectoryInUseError, match="made at <cell 3>:1; use that one, or close it first"):
        exec(cell, names)
    names["ckpt"].close()
    exec(cell, names)
    names["ckpt"].close()


def forgotten(run_dir: Path, kind: str) -> object:
    """Make a Checkpointer, save, and let go of it without closing it. Returns what lives on."""
    ckpt = Checkpointer(run_dir, CONFIG)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    if kind == "guarded":
        ckpt.guard(optimizer)
    handle = ckpt.save(3, STATE)
    if kind == "cycle":
        cycle: list[object] = [ckpt]
        cycle.append(cycle)
    if kind == "traceback":
        try:
            int("no number")
        except ValueError as error:
            held: list[object] = [error]  # whose traceback has this frame, which has the list
            held.append(held)
    return optimizer, handle


@pytest.mark.parametrize("kind", ["plain", "guarded", "cycle", "traceback"])
def test_one_that_nobody_holds_is_taken_over_with_its_saves(
    run_dir: Path, faults: Faults, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """1. a save is in flight, and its Checkpointer is forgotten. 2. the next one finishes that save, and then opens."""
    hold = faults.hold("part.write")
    alive = forgotten(run_dir, kind)
    hold.wait()
    gc.disable()  # the second one has to look for garbage itself
    try:
        hold.release()
        with caplog.at_level(logging.WARNING, "stager"), Checkpointer(run_dir, CONFIG) as second:
            loaded = second.load()
            assert loaded is not None and loaded.step == 3 and same(loaded.state, STATE)
            second.save(4, STATE).upload_completion.result()
    finally:
        gc.enable()
    assert f"made at {__file__}:" in caplog.text and "was never closed, and nobody holds it any more" in caplog.text
    del alive


def test_failed_save_of_one_that_was_taken_over_is_logged(
    run_dir: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    def forget() -> None:
        faults.arm("part.write", "raise")
        Checkpointer(run_dir, CONFIG).save(3, STATE)

    forget()
    gc.collect()
    with Checkpointer(run_dir, CONFIG) as second:
        assert second.latest() is None
    assert "closing an earlier Checkpointer, which nobody holds, failed" in caplog.text


def test_directory_of_another_path_and_a_closed_one_are_no_hindrance(run_dir: Path, tmp_path: Path) -> None:
    with Checkpointer(run_dir, CONFIG), Checkpointer(tmp_path / "other", CONFIG):
        pass
    for _ in range(2):
        Checkpointer(run_dir, CONFIG).close()
