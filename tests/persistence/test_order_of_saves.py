"""Two saves of one trainer to one name: the later one stays, whichever is committed first."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.manifest_file import read_header
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.write.write_task import WriteTask
from tests.persistence.tasks import make_task


def save_of(run_dir: Path, number: int, run: str = "a") -> WriteTask:
    run_dir.mkdir(exist_ok=True)
    job = make_task(run_dir, {"x": torch.full((50,), float(number))}, step=number, num_parts=1, fsync=False)
    # The clock says the opposite: it was set back.
    spec = replace(job.spec, name="last.ckpt", run=run, number=number, created=1000.0 - number)
    return replace(job, spec=spec)


def names(run_dir: Path) -> list[str]:
    return sorted(name for name in os.listdir(run_dir) if not name.startswith(".stager"))


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (3, 1, 2), (2, 3, 1)])
def test_one_after_the_other(run_dir: Path, order: tuple[int, ...]) -> None:
    for number in order:
        result = persist_part(save_of(run_dir, number), 0)
        assert result.committed is not None and result.committed.info.step == number
    assert read_header(run_dir / "last.ckpt").step == max(order)
    assert verify_checkpoint(run_dir / "last.ckpt").ok
    assert names(run_dir) == ["last.ckpt"]


def test_many_at_once(run_dir: Path) -> None:
    for round_ in range(5):
        numbers = list(range(round_ * 8 + 1, round_ * 8 + 9))
        random.Random(round_).shuffle(numbers)
        tasks = [save_of(run_dir, number) for number in numbers]
        begin = threading.Barrier(len(tasks))

        def commit(task: WriteTask, begin: threading.Barrier = begin) -> None:
            begin.wait()
            persist_part(task, 0)

        threads = [threading.Thread(target=commit, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read_header(run_dir / "last.ckpt").step == max(numbers)
    assert verify_checkpoint(run_dir / "last.ckpt").ok
    assert names(run_dir) == ["last.ckpt"]


def test_another_run_replaces_what_is_there(run_dir: Path) -> None:
    persist_part(save_of(run_dir, 9, run="a"), 0)
    persist_part(save_of(run_dir, 1, run="b"), 0)
    assert read_header(run_dir / "last.ckpt").step == 1
