"""The trainer as a process: forked children, changed directories, many saves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

import psutil
import pytest
import torch

from stager import Checkpointer, CheckpointInfo, ClosedError
from stager.workers.checkpoint.read.verify import verify_checkpoint


def in_fork(work: Callable[[], bool]) -> bool:
    """Run ``work`` in a forked child; whether it returned True."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12 and later, with threads
def test_forked_child_is_told_and_disturbs_nothing(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(0, {"x": torch.ones(10)}).upload_completion.result()

        def child() -> bool:
            try:
                ckpt.save(1, {"x": torch.ones(10)})
            except ClosedError as error:
                ckpt.close()  # does nothing here
                return "forked child" in str(error)
            return False

        assert in_fork(child)
        assert ckpt.save(2, {"x": torch.ones(10)}).upload_completion.result().step == 2


def test_changed_working_directory_does_not_move_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as ckpt:
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
        path = ckpt.save(0, {"x": torch.ones(10)}).upload_completion.result().path
    assert path == str(tmp_path / "run" / "step-00000000")
    assert verify_checkpoint(path).ok


def test_threads_that_save_at_once_take_turns(run_dir: Path) -> None:
    barrier = threading.Barrier(4)
    completions: list[Future[CheckpointInfo]] = []
    with Checkpointer(run_dir) as ckpt:

        def save(step: int) -> None:
            barrier.wait()
            completions.append(ckpt.save(step, {"x": torch.full((1000,), step)}).upload_completion)

        threads = [threading.Thread(target=save, args=(step,)) for step in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait(completions)
        for step in range(4):
            loaded = ckpt.load(step)
            assert loaded is not None and torch.all(loaded.state["x"] == step)


def test_many_saves_leave_memory_and_descriptors_where_they_were(run_dir: Path) -> None:
    state = {f"t{i}": torch.randn(64, 64) for i in range(50)}
    process = psutil.Process()
    with Checkpointer(run_dir, {"persistence": {"fsync": False}}) as ckpt:
        for _ in range(20):
            ckpt.save(0, state).upload_completion.result()
        before = process.num_fds(), process.memory_info().rss
        for _ in range(60):
            last = ckpt.save(0, state).upload_completion
        wait([last])
        after = process.num_fds(), process.memory_info().rss
    assert after[0] <= before[0]
    assert after[1] - before[1] < 10 << 20  # 60 saves of 800 KiB, 48 MiB
