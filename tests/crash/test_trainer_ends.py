"""The trainer ends in every way there is, with a save in flight, after and before it was staged.

After: the checkpoint is committed, by the trainer's last act or by the workers alone. Before: nothing looks like it. Either
way every worker ends, and the next run finds its directory free.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.aftermath import committed_steps, recover_as_the_next_run, wait_for_workers_to_end
from tests.crash.nursery import Nursery, Trainer
from tests.faults import Faults

_END = "tests.crash.trainers:end"


@dataclass(frozen=True)
class Way:
    """How a trainer ends.

    Attributes:
        way: what it does by itself.
        signals: what it is sent, each once the one before has shown.
        exitcode: what comes of it.
        drains: it finishes its saves itself: it does not end before they are done.
        complaint: in its standard error.
    """

    way: str
    exitcode: int
    signals: tuple[signal.Signals, ...] = ()
    drains: bool = False
    complaint: str = ""


WAYS = {
    "SIGKILL": Way("is signalled", -signal.SIGKILL, (signal.SIGKILL,)),
    "SIGTERM": Way("is signalled", -signal.SIGTERM, (signal.SIGTERM,)),
    "SIGHUP": Way("is signalled", -signal.SIGHUP, (signal.SIGHUP,)),
    "SIGSEGV": Way("is signalled", -signal.SIGSEGV, (signal.SIGSEGV,)),
    "os._exit": Way("calls os._exit", 6),
    "exception": Way("raises", 1, drains=True, complaint="KeyError: 'primary'"),
    "sys.exit": Way("calls sys.exit", 5, drains=True),
    "Ctrl-C": Way("is signalled", -signal.SIGINT, (signal.SIGINT,), drains=True, complaint="KeyboardInterrupt"),
    "Ctrl-C twice": Way(
        "is signalled",
        -signal.SIGINT,
        (signal.SIGINT, signal.SIGINT),
        complaint="step 1 is staged and not committed yet",
    ),
    "end of the program": Way("returns", 0, drains=True),
    "end of the program without close": Way("never closes", 0, drains=True),
}


def send_all(trainer: Trainer, signals: tuple[signal.Signals, ...]) -> None:
    for number, sent in enumerate(signals):
        if number:
            assert trainer.read() == "draining"
        trainer.send(sent)


# The other ways take these paths too; each costs seconds, for the start of a worker.
_ORDINARY = ("SIGKILL", "SIGTERM", "sys.exit", "Ctrl-C twice")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in _ORDINARY else pytest.mark.long) for n in WAYS])
def test_trainer_ends_after_staging_and_the_save_is_committed(
    run_dir: Path, faults: Faults, nursery: Nursery, name: str
) -> None:
    """The worker is held before it writes the first byte of step 1, until the trainer has ended, or waits for it."""
    way = WAYS[name]
    hold = faults.hold("part.begin", after=1)
    with nursery.start(_END, str(run_dir), way.way) as trainer:
        assert [trainer.read(), trainer.read()] == ["base", "staged"]
        hold.wait()
        send_all(trainer, way.signals)
        if way.drains:
            hold.release()
        assert trainer.wait() == way.exitcode
        if not way.drains:
            assert [path.name for path in run_dir.glob("step-*") if path.name == "step-00000001"] == []
            hold.release()
        wait_for_workers_to_end()
        complaints = trainer.stderr.read_text()
    assert way.complaint in complaints, complaints
    assert committed_steps(run_dir) == [0, 1]
    assert recover_as_the_next_run(run_dir) == []


# Each way once in the ordinary suite: most cost seconds, for the start of a worker.
# Ctrl-C when all is copied finishes the save: see tests/save/test_interrupt.py.
_BEFORE = [("SIGKILL", "save.copied"), ("SIGTERM", "save.planned"), ("Ctrl-C", "save.planned")]
_BEFORE_LONG = [(name, p) for name in ("SIGKILL", "SIGTERM", "SIGHUP") for p in ("save.planned", "save.copied")]


@pytest.mark.parametrize(
    ("name", "point"),
    _BEFORE + [pytest.param(*case, marks=pytest.mark.long) for case in _BEFORE_LONG if case not in _BEFORE],
)
def test_trainer_signalled_before_staging_leaves_nothing_that_looks_like_a_checkpoint(
    run_dir: Path, faults: Faults, nursery: Nursery, name: str, point: str
) -> None:
    """In the middle of ``save()``: before a byte is copied, and when all are copied but none is handed over."""
    way = WAYS[name]
    hold = faults.hold(point, after=1)
    with nursery.start(_END, str(run_dir), way.way) as trainer:
        assert trainer.read() == "base"
        hold.wait()
        send_all(trainer, way.signals)
        assert trainer.wait() == way.exitcode
        assert "staged" not in trainer.stdout.read()
    wait_for_workers_to_end()
    assert committed_steps(run_dir) == [0]
    assert recover_as_the_next_run(run_dir) == []


@pytest.mark.parametrize("action", ["exit", "raise"])
def test_trainer_that_ends_itself_before_staging_leaves_nothing_that_looks_like_a_checkpoint(
    run_dir: Path, faults: Faults, nursery: Nursery, action: str
) -> None:
    faults.arm("save.copied", f"{action} after=1")
    with nursery.start(_END, str(run_dir), "returns") as trainer:
        assert trainer.read() == "base"
        assert trainer.wait() == {"exit": 3, "raise": 1}[action]
        assert "staged" not in trainer.stdout.read()
    wait_for_workers_to_end()
    assert committed_steps(run_dir) == [0]


def test_program_that_ends_while_a_snapshot_is_taken_waits_for_it(
    run_dir: Path, faults: Faults, nursery: Nursery
) -> None:
    hold = faults.hold("save.overlapped")
    with nursery.start("tests.crash.trainers:end_while_staging", str(run_dir)) as trainer:
        assert trainer.read() == "staging"
        hold.wait()
        hold.release()
        assert trainer.wait() == 0
    wait_for_workers_to_end()
    assert committed_steps(run_dir) == [0, 1]
