"""The workers of a save begin while its slab is being filled: NOTE [ A slab that is half filled ].

What was not whole is never committed, whoever dies, and whenever. What was whole is.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from stager import Checkpointer, LeftRunningError, StorageError
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.crash.aftermath import committed_steps, recover_as_the_next_run, wait_for_workers_to_end
from tests.crash.nursery import Nursery
from tests.faults import Faults
from tests.states import same

_MIB = 40  # a state of several stretches, and of more than one range that is copied at once
_CONFIG = {
    "workers": {"count": 2, "heartbeat_timeout_secs": 1.0},
    "persistence": {"segment_bytes": "1MiB", "fsync": False},
}


def _receipts(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.glob("*.partial-*/receipt*")]


def _state(number: int) -> dict[str, torch.Tensor]:
    return {str(n): torch.full((1 << 18,), float(number + n)) for n in range(_MIB)}


def _kill_while_filling(
    run_dir: Path, faults: Faults, nursery: Nursery, *, is_guarded: bool, point: str, after: int
) -> None:
    """Kill the trainer at a visit of ``point`` in the save of step 1."""
    hold = faults.hold(point, after)
    with nursery.start("tests.crash.trainers:end_half_filled", str(run_dir), _MIB, is_guarded) as trainer:
        assert trainer.read() == "base"
        hold.wait()
        trainer.send(signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
        assert "staged" not in trainer.stdout.read()
    wait_for_workers_to_end()
    assert committed_steps(run_dir) == [0]
    assert recover_as_the_next_run(run_dir) == []  # the workers have removed what they wrote


@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize(("point", "after"), [("save.filled", 1), ("save.filled", 3), ("save.copied", 1)])
def test_trainer_killed_while_it_fills_the_slab_and_nothing_is_committed(
    run_dir: Path, faults: Faults, nursery: Nursery, is_guarded: bool, point: str, after: int
) -> None:
    _kill_while_filling(run_dir, faults, nursery, is_guarded=is_guarded, point=point, after=after)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_guarded", [False, True])
def test_trainer_killed_while_it_fills_the_slab_100_times(
    tmp_path: Path, faults: Faults, nursery: Nursery, is_guarded: bool
) -> None:
    for number in range(100):
        point, after = random.Random(number).choice([("save.filled", n) for n in range(1, 40)] + [("save.copied", 1)])
        run_dir = tmp_path / f"run-{number}"
        for left in ("hold-save.filled", "hold-save.copied"):
            for end in ("reached", "go"):
                (faults.directory / f"{left}.{end}").unlink(missing_ok=True)
        _kill_while_filling(run_dir, faults, nursery, is_guarded=is_guarded, point=point, after=after)


def test_nothing_is_signed_before_the_snapshot_is_whole(run_dir: Path, faults: Faults, nursery: Nursery) -> None:
    """1. every byte is copied, and the trainer has not said so 2. a worker has written all 3. the trainer dies."""
    planned, copied = faults.hold("save.planned", after=1), faults.hold("save.copied", after=1)
    with nursery.start("tests.crash.trainers:end_half_filled", str(run_dir), _MIB, False) as trainer:
        assert trainer.read() == "base"
        planned.wait()
        synced = faults.hold("part.synced")  # of step 1: step 0 is committed
        planned.release()
        copied.wait()
        synced.wait()
        assert _receipts(run_dir) == []
        trainer.send(signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
        synced.release()
    wait_for_workers_to_end()
    assert committed_steps(run_dir) == [0]


@pytest.mark.parametrize("way", ["kill", "segv", "stop"])
def test_worker_dies_while_it_waits_for_bytes_and_the_save_commits(run_dir: Path, faults: Faults, way: str) -> None:
    """1. the copy is held 2. a worker, which waits for the rest, dies 3. the copy goes on."""
    with Checkpointer(run_dir, _CONFIG) as ckpt:
        model = nn.ParameterDict({name: nn.Parameter(value) for name, value in _state(1).items()})
        optimizer = torch.optim.SGD(model.values())
        ckpt.guard(optimizer)
        with faults.hold("save.filled") as hold:
            faults.arm("part.waiting", way)
            handle = ckpt.save(1, {"model": model})
            hold.wait()
            while not faults.fired("part.waiting"):
                os.sched_yield()
            assert not handle.staging_completion.done()
            hold.release()
        info = handle.upload_completion.result()
        assert verify_checkpoint(info.path).problems == ()
        loaded = ckpt.load(1)
        assert loaded is not None and same(loaded.state["model"], dict(model.state_dict()))


def test_disk_full_while_the_slab_is_filled_fails_this_save_only(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, _CONFIG) as ckpt:
        model = nn.ParameterDict({name: nn.Parameter(value) for name, value in _state(1).items()})
        optimizer = torch.optim.SGD(model.values())
        ckpt.guard(optimizer)
        with faults.hold("save.filled", after=30) as hold:
            faults.arm("part.write", "errno ENOSPC")
            failing = ckpt.save(1, {"model": model})
            hold.wait()
            while not faults.fired("part.write"):
                os.sched_yield()
            hold.release()
        assert isinstance(failing.upload_completion.exception(), StorageError)
        ckpt.save(2, {"model": model}).upload_completion.result()
        assert [info.step for info in ckpt.checkpoints()] == [2]
        assert not list(run_dir.glob("*.partial-*"))


@pytest.mark.parametrize("is_guarded", [False, True])
def test_copy_that_fails_gives_the_workers_up_and_the_next_save_is_whole(
    run_dir: Path, faults: Faults, is_guarded: bool
) -> None:
    with Checkpointer(run_dir, _CONFIG) as ckpt:
        state = _state(1)
        parameters = {name: nn.Parameter(value) for name, value in state.items()}
        optimizer = torch.optim.SGD(parameters.values())
        if is_guarded:
            ckpt.guard(optimizer)
        for step in range(1, 6):  # more than there are slabs
            faults.arm("save.filled", f"errno EIO after={step % 3}")
            with pytest.raises(OSError, match="Input/output error"):
                ckpt.save(step, parameters).upload_completion.result()
        ckpt.save(6, parameters).upload_completion.result()
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 6 and same(loaded.state, state)
        assert [info.step for info in ckpt.checkpoints()] == [6]
        assert not list(run_dir.glob("*.partial-*"))


def test_save_in_pieces_is_written_while_each_piece_is_filled(run_dir: Path) -> None:
    config = {**_CONFIG, "arena": {"max_host_bytes": "24MiB", "buffers": 2}}
    with Checkpointer(run_dir, config) as ckpt:
        for step in range(3):
            ckpt.save(step, _state(step)).upload_completion.result()
            loaded = ckpt.load()
            assert loaded is not None and same(loaded.state, _state(step))


def test_part_that_failed_before_the_snapshot_was_whole_breaks_the_promise(run_dir: Path, faults: Faults) -> None:
    """1. the copy is held 2. a part fails 3. the copy ends: the save is never called staged."""
    with Checkpointer(run_dir, _CONFIG) as ckpt:
        model = nn.ParameterDict({name: nn.Parameter(value) for name, value in _state(1).items()})
        optimizer = torch.optim.SGD(model.values())
        ckpt.guard(optimizer)
        with faults.hold("save.copied") as hold:
            faults.arm("part.write", "errno EIO")
            failing = ckpt.save(1, {"model": model})
            hold.wait()
            while not faults.fired("part.write") or failing._save.parts[0] == 0:
                os.sched_yield()
            hold.release()
        assert isinstance(failing.upload_completion.exception(), StorageError)
        assert isinstance(failing.staging_completion.exception(), StorageError)


def test_close_that_detaches_while_the_slab_is_filled_resolves_every_future(run_dir: Path, faults: Faults) -> None:
    ckpt = Checkpointer(run_dir, {**_CONFIG, "persistence": {"fsync": False}})
    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in _state(1).items()})
    optimizer = torch.optim.SGD(model.values())
    ckpt.guard(optimizer)
    hold = faults.hold("save.copied")
    handle = ckpt.save(1, {"model": model})
    hold.wait()
    ckpt._run.pool.detach()  # type: ignore[attr-defined]  # as close() does when its deadline is over
    hold.release()
    assert isinstance(handle.upload_completion.exception(), LeftRunningError)
    handle.staging_completion.result()
    ckpt.close()
    wait_for_workers_to_end()
    assert [info.step for info in list_checkpoints(run_dir)[0]] == [1]
