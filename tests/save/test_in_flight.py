"""Saves that overlap: with each other, with training, with errors."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path

import pytest
import torch

from stager import ArenaFullError, Checkpointer, ClosedError, DirectoryInUseError, SaveState, StorageError, UsageError
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix.run_lock import lock_directory
from tests.faults import Faults
from tests.states import same
from tests.waiting import wait_until_blocked


@pytest.mark.parametrize("num_pairs", [40, pytest.param(200, marks=pytest.mark.long)])
def test_two_saves_in_a_row_each_hold_exactly_their_own_values(run_dir: Path, faults: Faults, num_pairs: int) -> None:
    """The second begins while the first is held in the middle of being written; random sizes."""
    rng = random.Random(0)
    with Checkpointer(run_dir, {"persistence": {"fsync": False}}) as ckpt:
        for pair in range(num_pairs):
            state = {
                f"t{i}": torch.randint(0, 1 << 30, (rng.randrange(1, 20_000),)) for i in range(rng.randrange(1, 6))
            }
            first_values = {name: tensor.clone() for name, tensor in state.items()}
            hold = faults.hold("part.write")
            first = ckpt.save(2 * pair, state)
            hold.wait()
            for tensor in state.values():
                tensor.add_(1)
            second_values = {name: tensor.clone() for name, tensor in state.items()}
            second = ckpt.save(2 * pair + 1, state)
            for tensor in state.values():
                tensor.zero_()
            assert not first.upload_completion.done()
            hold.release()
            hold.remove()
            for handle, expected in ((first, first_values), (second, second_values)):
                handle.upload_completion.result()
                loaded = ckpt.load(handle.step)
                assert loaded is not None and same(loaded.state, expected)


@pytest.mark.parametrize("when_full", ["skip", "raise"])
def test_full_arena_skips_or_raises(run_dir: Path, faults: Faults, when_full: str) -> None:
    state = {"x": torch.ones(1000)}
    with Checkpointer(run_dir, {"arena": {"when_full": when_full}, "workers": {"count": 1}}) as ckpt:
        hold = faults.hold("part.write")
        handles = [ckpt.save(0, state), ckpt.save(1, state)]
        hold.wait()
        if when_full == "raise":
            with pytest.raises(ArenaFullError, match=r"arena\.when_full"):
                ckpt.save(2, state)
        else:
            skipped = ckpt.save(2, state)
            assert skipped.state is SaveState.SKIPPED
            assert skipped.staging_completion.result() is None
            assert skipped.upload_completion.cancelled()
        hold.release()
        assert [h.upload_completion.result().step for h in handles] == [0, 1]
        assert ckpt.save(3, state).upload_completion.result().step == 3


def test_full_arena_waits_for_a_commit(run_dir: Path, faults: Faults) -> None:
    state = {"x": torch.ones(1000)}
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        with faults.hold("part.write") as hold:
            handles = [ckpt.save(0, state), ckpt.save(1, state)]
            hold.wait()
            third = threading.Thread(target=lambda: handles.append(ckpt.save(2, state)))
            third.start()
            wait_until_blocked(third, Checkpointer.save)
            assert len(handles) == 2
            hold.release()
        third.join()
        assert [h.upload_completion.result().step for h in handles] == [0, 1, 2]


def test_guarded_step_waits_for_the_snapshot(run_dir: Path, faults: Faults) -> None:
    """1. the staging thread is held before it copies; 2. a step begins and waits in the guard; 3. only then is the copy
    made: the checkpoint must hold the values from before the step, and the buffer that nothing guards those from save()."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    with Checkpointer(run_dir, {"staging": {"verify": True}}) as ckpt:
        ckpt.guard(optimizer)
        expected = {k: v.clone() for k, v in model.state_dict().items()}
        with faults.hold("save.overlapped") as hold:
            handle = ckpt.save(1, {"model": model, "optimizer": optimizer})
            hold.wait()
            assert not handle.staging_completion.done()
            model(torch.randn(8, 64)).sum().backward()  # changes the running statistics, which are not guarded

            def take_step() -> None:
                optimizer.step()

            step = threading.Thread(target=take_step)
            step.start()
            wait_until_blocked(step, take_step)
            assert same(dict(model.named_parameters()), {name: expected[name] for name, _ in model.named_parameters()})
            assert not handle.staging_completion.done()
            hold.release()
            step.join()
            assert handle.staging_completion.done()
        handle.upload_completion.result()
        loaded = ckpt.load(1)
        assert loaded is not None and same(dict(loaded.state["model"]), expected)
        assert not same(dict(model.state_dict()), expected)


def test_error_of_a_save_is_in_its_future_and_raised_once_by_the_next_call(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, {"x": torch.ones(10)}).upload_completion.result()
        faults.arm("part.write", "errno ENOSPC")
        handle = ckpt.save(1, {"x": torch.ones(10)})
        error = super(type(handle.upload_completion), handle.upload_completion).exception()  # looks, without reading
        assert isinstance(error, StorageError)
        with pytest.raises(StorageError, match="free space on this file system"):
            ckpt.save(2, {"x": torch.ones(10)})
        assert ckpt.save(3, {"x": torch.ones(10)}).upload_completion.result().step == 3
        assert [c.step for c in ckpt.checkpoints()] == [0, 2, 3]  # the save that raised was begun all the same
        assert not list(run_dir.glob("*partial*"))


def test_error_that_nobody_read_is_raised_by_close_but_masks_nothing(run_dir: Path, faults: Faults) -> None:
    faults.arm("part.write", "errno EIO")
    with pytest.raises(StorageError), Checkpointer(run_dir) as ckpt:
        ckpt.save(0, {"x": torch.ones(10)})
    faults.arm("part.write", "errno EIO")
    with pytest.raises(KeyError, match="primary"), Checkpointer(run_dir) as ckpt:
        ckpt.save(0, {"x": torch.ones(10)})
        raise KeyError("primary")


def test_close_tells_every_error_that_nobody_has_looked_at(run_dir: Path, faults: Faults) -> None:
    ckpt = Checkpointer(run_dir, {"workers": {"count": 1}, "arena": {"buffers": 3}})
    hold = faults.hold("part.begin")
    for step in range(3):
        ckpt.save(step, {"x": torch.ones(3)})
    hold.wait()
    faults.arm("part.write", "errno ENOSPC")
    faults.arm("commit.begin", "errno EIO")
    hold.release()
    with pytest.raises(StorageError) as raised:
        ckpt.close()
    told, error = [], raised.value
    while error is not None:
        told.append(getattr(error, "errno", None))
        error = error.__cause__ or error.__context__
    assert errno.ENOSPC in told and errno.EIO in told
    assert [info.step for info in ckpt.checkpoints()] == [2]


def test_close_finishes_what_is_in_flight(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        handles = [ckpt.save(step, {"x": torch.full((1000,), float(step))}) for step in range(5)]
    assert [h.upload_completion.result().step for h in handles] == list(range(5))
    assert all(verify_checkpoint(h.upload_completion.result().path).ok for h in handles)
    with pytest.raises(ClosedError):
        ckpt.save(9, {})
    with Checkpointer(run_dir, read_only=True) as reader:
        latest = reader.latest()
        assert latest is not None and latest.step == 4
        with pytest.raises(ClosedError, match="read_only"):
            reader.save(5, {})


def test_second_run_in_one_directory_is_refused(run_dir: Path) -> None:
    run_dir.mkdir()
    lock_fd = lock_directory(str(run_dir), 0)  # as another process would
    with pytest.raises(DirectoryInUseError, match="another run"):
        Checkpointer(run_dir, {"persistence": {"lock_timeout_secs": 0}})
    Checkpointer(run_dir, read_only=True).close()
    os.close(lock_fd)


def test_saving_a_step_again_replaces_it(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        for value in (1.0, 2.0):
            ckpt.save(7, {"x": torch.tensor(value)}).upload_completion.result()
        loaded = ckpt.load(7)
        assert loaded is not None and loaded.state["x"] == 2.0
        assert [c.step for c in ckpt.checkpoints()] == [7]


def test_report_tells_what_the_save_cost(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        handle = ckpt.save(1, {"x": torch.ones(1000), "n": 1})
        handle.upload_completion.result()
        report = handle.report
    assert (report.step, report.state, report.num_tensors, report.num_objects) == (1, "committed", 1, 1)
    assert report.nbytes > 4000
    stamps = [report.staged_secs, report.written_secs, report.synced_secs, report.committed_secs]
    assert all(s is not None for s in stamps) and stamps == sorted(stamps)
    assert {"plan", "stage", "hand over", "write", "sync", "commit"} <= {event.name for event in report.timings}


def test_telemetry_files(run_dir: Path, tmp_path: Path) -> None:
    import json

    config = {"telemetry": {"events": str(tmp_path / "events.jsonl"), "trace": str(tmp_path / "trace.json")}}
    with Checkpointer(run_dir, config) as ckpt:
        for step in range(2):
            ckpt.save(step, {"x": torch.ones(10)})
    reports = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sorted(r["step"] for r in reports) == [0, 1]
    trace = json.loads((tmp_path / "trace.json").read_text().rstrip().rstrip(",") + "]")
    assert {"X"} == {event["ph"] for event in trace}


def test_too_little_free_space_is_refused_before_writing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"x": torch.ones(1000)}
    with Checkpointer(run_dir) as ckpt:
        real = os.statvfs(run_dir)
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:4], 0, *real[5:])))
        with pytest.raises(StorageError, match=r"does not fit the 0 bytes that are free; nothing was written"):
            ckpt.save(0, state)
        monkeypatch.undo()
        assert ckpt.save(1, state).upload_completion.result().step == 1
    assert [path.name for path in run_dir.glob("step-*")] == ["step-00000001"]


def test_callback_may_look_and_is_refused_what_would_wait_for_itself(run_dir: Path, faults: Faults) -> None:
    """With one buffer short, a save in a callback would wait for the thread it runs in."""
    hold = faults.hold("part.write")  # a callback that is added to a Future that is done runs in the caller's thread
    seen: list[object] = []

    def callback(_: object) -> None:
        seen.append(ckpt.latest())
        for call in (lambda: ckpt.save(9, {}), ckpt.close, ckpt.wait_for_staging):
            try:
                call()
            except UsageError as error:
                seen.append(error)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(10))])
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        handle = ckpt.save(0, {"optimizer": optimizer, "p": optimizer.param_groups[0]["params"][0]})
        called = threading.Event()
        handle.upload_completion.add_done_callback(lambda future: (callback(future), called.set()))
        hold.wait()
        hold.release()
        called.wait()
        assert handle.upload_completion.result() == seen[0]
        assert [type(entry) for entry in seen[1:]] == [UsageError] * 3
        assert ckpt.save(1, {"x": torch.ones(1)}).upload_completion.result().step == 1
