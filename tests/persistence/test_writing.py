"""How bytes get to the disk: the limit by a clock that only sleeping moves, the page cache by asking the kernel."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stager import Checkpointer
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import write_back as writing
from stager.workers.checkpoint.storage.posix.write_back import WriteBack, drop_cached
from stager.workers.checkpoint.storage.writing import Pace, Writing
from stager.workers.checkpoint.write import part_writer
from tests.persistence.tasks import load, make_task, run
from tests.states import same

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        assert secs >= 0
        self.now += secs


@pytest.mark.parametrize("seed", range(5))
def test_no_stretch_of_time_gets_more_than_the_limit_and_one_write(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    rate = 10 * MIB
    pace = Pace(rate, clock, clock.sleep)
    writes: list[tuple[float, int]] = []
    for _ in range(200):
        clock.now += rng.choice([0, 0, 0, 0.01, 0.5, 20])  # hashing and writing take time; there are pauses
        nbytes = rng.randrange(1, 4 * MIB)
        writes.append((clock.now, nbytes))
        pace.wrote(nbytes)
    for first in range(len(writes)):
        total = 0
        for at, nbytes in writes[first:]:
            assert total <= rate * (at - writes[first][0]) + 1  # what came before this write; 1: rounding
            total += nbytes


def test_limit_is_used_in_full_when_writing_takes_no_time() -> None:
    clock = Clock()
    pace = Pace(8 * MIB, clock, clock.sleep)
    for _ in range(64):
        pace.wrote(MIB)
    assert clock.now == pytest.approx(108.0)


def test_no_limit_never_sleeps() -> None:
    def refuse(secs: float) -> None:
        raise AssertionError("slept")

    Pace(None, sleep=refuse).wrote(1 << 40)


def test_every_byte_of_a_part_counts_against_the_limit(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir.mkdir()
    clocks: list[Clock] = []

    def pace(rate: float | None) -> Pace:
        clocks.append(Clock())
        return Pace(rate, clocks[-1], clocks[-1].sleep)

    monkeypatch.setattr(part_writer, "Pace", pace)
    state = {"big": torch.ones(3 * MIB), "small": [torch.ones(9) for _ in range(50)], "text": "x"}
    job = replace(make_task(run_dir, state, num_parts=3), writing=Writing(max_bytes_per_sec=MIB))
    info = run(job).info
    nbytes = sum(path.stat().st_size for path in Path(info.path).glob("*.distcp"))
    assert len(clocks) == 3
    assert sum(clock.now - 100.0 for clock in clocks) == pytest.approx(nbytes / MIB)


@pytest.mark.parametrize("count", [1, 4])
def test_trainer_s_limit_is_shared_by_its_workers(run_dir: Path, count: int) -> None:
    config = {"workers": {"count": count}, "persistence": {"max_bytes_per_sec": "8GiB"}}
    with Checkpointer(run_dir, config) as ckpt:
        assert ckpt._run.saver._hand_over.writing.max_bytes_per_sec == (8 << 30) / count
        ckpt.save(1, {"a": torch.ones(5)}).upload_completion.result()


def test_write_back_starts_in_stretches_and_leaves_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(writing, "start_write_back", lambda fd, offset, nbytes: started.append((offset, nbytes)))
    back = WriteBack(-1)
    for offset in range(0, 40 * MIB, 4 * MIB):
        back.wrote(offset, 4 * MIB)
    for offset in range(100 * MIB, 117 * MIB, 3 * MIB):  # elsewhere: what was begun is left to fsync
        back.wrote(offset, 3 * MIB)
    assert started == [(0, 16 * MIB), (16 * MIB, 16 * MIB), (100 * MIB, 18 * MIB)]


def test_write_back_of_what_cannot_be_is_no_error() -> None:
    read_end, write_end = os.pipe()
    writing.start_write_back(write_end, 0, 1)  # ESPIPE
    os.close(read_end)
    os.close(write_end)
    writing.start_write_back(write_end, 0, 1)  # EBADF


def num_cached(path: Path) -> int:
    """Pages of a file that are in the page cache."""
    nbytes = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(nbytes), pages) == 0
        del start
        return sum(page & 1 for page in pages)


def cache_can_be_dropped(directory: Path) -> bool:
    """Not in memory file systems."""
    path = directory / "probe"
    path.write_bytes(b"x" * (8 * mmap.PAGESIZE))
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        drop_cached(file.fileno())
    found = num_cached(path)
    path.unlink()
    return found == 0


@pytest.mark.parametrize("drop", [False, True])
def test_what_was_synced_leaves_the_page_cache_if_wanted(run_dir: Path, drop: bool) -> None:
    run_dir.mkdir()
    if not cache_can_be_dropped(run_dir):
        pytest.skip("this file system keeps its pages in memory")
    state = {"big": torch.arange(6.0 * MIB), "text": "x"}
    info = run(replace(make_task(run_dir, state), writing=Writing(drop, direct_io=False))).info
    cached = sum(map(num_cached, Path(info.path).glob("__0_[0-9].distcp")))
    assert cached == 0 if drop else cached * mmap.PAGESIZE >= 24 * MIB
    assert verify_checkpoint(info.path).ok and same(load(info), state)


def test_dropping_without_syncing_is_warned_about(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        Checkpointer(run_dir, {"persistence": {"fsync": False, "drop_page_cache": True}}),
    ):
        pass
    assert "persistence.drop_page_cache is true, but persistence.fsync is false" in caplog.text
