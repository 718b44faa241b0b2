"""Progress for whoever waits: on a terminal, and nowhere else."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

from stager import Checkpointer
from stager.saving import progress
from stager.saving.destination import Destination
from stager.saving.progress import SaveProgress
from stager.saving.save import Save
from stager.telemetry.report import SaveState
from tests.faults import Faults
from tests.waiting import wait_until


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, force_jupyter=False, color_system=None)


def shown(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


def a_save() -> Save:
    save = Save(7, "a7", 1, lambda make: None, Destination("", "", None), {})
    save.record(nbytes=256 << 20)
    return save


def test_a_line_says_what_a_save_is_at() -> None:
    save = a_save()
    bar = SaveProgress(True, lambda: [save])
    on = console(terminal=True)
    on.print(bar.table("closing, 3 s"))
    assert "closing, 3 s" in shown(on) and "step 7" in shown(on) and "256.0 MiB" in shown(on)
    assert "waiting for a buffer" in shown(on)
    for state in (SaveState.STAGING, SaveState.STAGED, SaveState.PERSISTING):
        save.move(state)
    on.print(bar.table("closing, 4 s"))
    assert "0 of 0 parts written" in shown(on)


@pytest.mark.parametrize(("is_on", "terminal"), [(False, True), (True, False)])
def test_nothing_is_shown_where_nobody_looks_or_nobody_asked(is_on: bool, terminal: bool) -> None:
    on = console(terminal=terminal)
    with SaveProgress(is_on, lambda: [a_save()], lambda: on).shown("closing"):
        assert not [thread for thread in threading.enumerate() if thread.name == "stager-progress"]
    assert shown(on) == ""


def test_closing_shows_the_saves_in_flight_on_a_terminal(
    run_dir: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a save is held while it is written. 2. close() waits, and shows it. 3. the save goes on."""
    monkeypatch.setattr(progress, "_DELAY_SECS", 0)
    on = console(terminal=True)
    ckpt = Checkpointer(run_dir, {"workers": {"count": 1}, "telemetry": {"progress": True}})
    ckpt._run.saver.progress = SaveProgress(True, ckpt._run.saver.completion.in_flight, lambda: on)
    with faults.hold("part.write") as hold:
        ckpt.save(3, {"x": torch.ones(1000)})
        hold.wait()
        closing = threading.Thread(target=ckpt.close)
        closing.start()
        wait_until(lambda: "step 3" in shown(on))
        hold.release()
    closing.join()
    assert "closing" in shown(on) and "0 of 1 parts written" in shown(on)
