"""Writing past the page cache: byte for byte what the other way writes; what the file system refuses goes that way."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import direct_io as direct
from stager.workers.checkpoint.storage.posix.direct_io import (
    BLOCK_BYTES,
    BUFFER_BYTES,
    IN_PLACE_FROM_BYTES,
    DirectWriter,
)
from stager.workers.checkpoint.storage.posix.file_sink import FileSink
from stager.workers.checkpoint.storage.writing import Writing
from stager.workers.errors import StorageError
from tests.persistence.tasks import load, make_task, run
from tests.persistence.test_writing import cache_can_be_dropped, num_cached
from tests.states import same

MIB = 1 << 20
Open = Callable[[int], int]


def no_check(nbytes: int) -> None:
    pass


@contextmanager
def writer_of(
    paths: list[Path], reopen: Open | None = None, check: Callable[[int], None] = no_check
) -> Iterator[DirectWriter]:
    fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC) for path in paths]
    opened: list[int] = []

    def reopen_direct(file: int) -> int:
        opened.append(os.open(paths[file], os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC))
        return opened[-1]

    writer = DirectWriter(fds.__getitem__, reopen or reopen_direct, check)
    try:
        yield writer
    finally:
        writer.close()
        for fd in fds + opened:
            os.close(fd)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A directory where O_DIRECT can be asked for, and where it can be seen that it was."""
    try:
        os.close(os.open(tmp_path / "try", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"this file system takes no O_DIRECT: {error}")
    if not cache_can_be_dropped(tmp_path):
        pytest.skip("this file system keeps its pages in memory")
    return tmp_path


def pieces_of(rng: random.Random, start: int, nbytes: int) -> Iterator[tuple[int, bytes]]:
    """A part of a file, in pieces of very different sizes."""
    end = start + nbytes
    while start < end:
        size = min(rng.choice([1, 100, BLOCK_BYTES, 70_000, 3 * MIB, BUFFER_BYTES]), end - start)
        yield start, rng.randbytes(size)
        start += size


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_byte_is_at_its_place(tmp_path: Path, seed: int, refused: bool) -> None:
    rng = random.Random(seed)
    paths = [tmp_path / "first", tmp_path / "second"]
    expected = [bytearray(40 * MIB), bytearray(40 * MIB)]

    def refuse(file: int) -> int:
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    with writer_of(paths, refuse if refused else None) as writer:
        for _ in range(3):
            file, start = rng.randrange(2), rng.choice([0, 1, BLOCK_BYTES, 5 * BLOCK_BYTES + 17, 12_345_678])
            for offset, piece in pieces_of(rng, start, rng.choice([1, 4095, BLOCK_BYTES, 9 * MIB + 5, 20 * MIB])):
                writer.put(file, offset, piece)
                expected[file][offset : offset + len(piece)] = piece
        writer.flush()
        for path, data in zip(paths, expected, strict=True):
            found = path.read_bytes()
            assert found == data[: len(found)] and not any(data[len(found) :])


def test_whole_blocks_do_not_touch_the_page_cache(room: Path) -> None:
    path, nbytes = room / "file", 20 * MIB + 5
    with writer_of([path]) as writer:
        writer.put(0, 3, os.urandom(nbytes))
        writer.flush()
    assert num_cached(path) == 2  # where it begins and ends


@pytest.mark.parametrize("seed", range(4))
def test_whole_blocks_are_written_from_where_they_lie(tmp_path: Path, seed: int) -> None:
    rng, nbytes = random.Random(seed), 30 * MIB
    path = tmp_path / "file"
    memory = mmap.mmap(-1, nbytes)  # begins with a page, as a slab does
    memory.write(rng.randbytes(nbytes))
    with memoryview(memory) as view, writer_of([path]) as writer:
        for start, end in ((5000, 12 * MIB + 77), (0, 5000), (12 * MIB + 77, nbytes - 3)):
            position = start
            while position < end:
                size = rng.choice([10, BLOCK_BYTES, IN_PLACE_FROM_BYTES, 3 * MIB, 4 * MIB])
                piece = view[position : min(position + size, end)]
                writer.put(0, position, piece, in_place=rng.random() < 0.8)
                position += len(piece)
        writer.put(0, nbytes - 3, view[-3:], in_place=True)
        writer.flush()
        assert path.read_bytes() == view


def test_what_lies_in_place_is_not_copied(tmp_path: Path) -> None:
    with memoryview(mmap.mmap(-1, 8 * MIB)) as view, writer_of([tmp_path / "file"]) as writer:
        buffers = [buffer.memory for buffer in writer._buffers]
        for memory in buffers:  # they may be those of an earlier writer
            memory[:] = bytes(len(memory))
        view[:] = b"a" * len(view)
        writer.put(0, 0, view[: 4 * MIB], in_place=True)
        writer.put(0, 4 * MIB, view[4 * MIB :], in_place=True)
        writer.flush()
        assert not any(b"a" in bytes(memory) for memory in buffers)
    assert (tmp_path / "file").read_bytes() == b"a" * 8 * MIB


def test_two_parts_that_meet_in_one_block(tmp_path: Path) -> None:
    data, middle = os.urandom(20 * MIB), 9 * MIB + 1234
    path = tmp_path / "file"
    with writer_of([path]) as first, writer_of([path]) as second:
        for at in range(0, 9 * MIB, MIB):  # in turn
            second.put(0, middle + at, data[middle + at : middle + at + MIB])
            first.put(0, at, data[at : at + MIB])
        first.put(0, 9 * MIB, data[9 * MIB : middle])
        second.put(0, middle + 9 * MIB, data[middle + 9 * MIB :])
        second.flush()
        first.flush()
    assert path.read_bytes() == data


def test_refused_in_the_middle_goes_on_through_the_page_cache(tmp_path: Path) -> None:
    """Like a network file system that opens with O_DIRECT and refuses the write."""
    path, data = tmp_path / "file", os.urandom(20 * MIB + 7)
    refusing = os.open("/proc/self/oom_score_adj", os.O_WRONLY)  # EINVAL for whatever is no number
    with writer_of([path], lambda file: refusing) as writer:
        writer.put(0, 0, data)
        writer.flush()
    os.close(refusing)
    assert path.read_bytes() == data


@pytest.mark.parametrize("nbytes", [BUFFER_BYTES // 2, 3 * BUFFER_BYTES])
def test_error_of_an_earlier_write_is_raised_at_the_latest_by_flush(tmp_path: Path, nbytes: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with writer_of([tmp_path / "file"], lambda file: full) as writer, pytest.raises(OSError) as caught:
        writer.put(0, 0, bytes(nbytes))
        writer.flush()
    os.close(full)
    assert caught.value.errno == errno.ENOSPC


def test_open_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    def fail(file: int) -> int:
        raise OSError(errno.EMFILE, "too many")

    with writer_of([tmp_path / "file"], fail) as writer, pytest.raises(OSError) as caught:
        writer.put(0, 0, bytes(BUFFER_BYTES))
    assert caught.value.errno == errno.EMFILE


def test_each_write_is_announced_with_its_size(tmp_path: Path) -> None:
    announced: list[int] = []
    with writer_of([tmp_path / "file"], check=announced.append) as writer:
        writer.put(0, 10, bytes(BUFFER_BYTES))
        writer.put(0, 10 + BUFFER_BYTES, bytes(5))
        writer.flush()
    assert announced == [BUFFER_BYTES - 10, 15]


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_checkpoints_are_the_same_either_way(tmp_path: Path, kind: str) -> None:
    state = {"big": torch.arange(6.0 * MIB), "odd": torch.ones(1_234_567, dtype=torch.uint8), "small": torch.ones(3)}
    found: list[dict[str, bytes]] = []
    for direct_io in (False, True):
        directory = tmp_path / str(direct_io)
        directory.mkdir()
        info = run(replace(make_task(directory, state, kind=kind), writing=Writing(direct_io=direct_io))).info
        assert verify_checkpoint(info.path).ok and same(load(info), state)
        data = [path for path in Path(info.path).rglob("*") if path.stat().st_size > MIB]
        found.append({path.name: path.read_bytes() for path in data})
    assert found[0] == found[1] and found[0]


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
@pytest.mark.parametrize("in_order", [False, True])
def test_large_tensors_lie_in_the_slab_as_in_their_file(kind: str, in_order: bool) -> None:
    flat = flatten(
        {
            "odd": torch.ones(77, dtype=torch.uint8),
            "big": [torch.ones(MIB + number) for number in range(5)],
            "column": torch.ones(MIB, 3)[:, 1],
            "tied": {"a": (shared := torch.ones(2 * MIB)), "b": shared},
        }
    )
    plan = Planner(get_format(kind), 2, 64 << 20, in_order=in_order).plan(flat)
    large = [item for item in plan.layout.tensors if item.data_nbytes >= MIB]
    assert len(large) == 7
    assert all((item.slab_offset - item.data_offset) % BLOCK_BYTES == 0 for item in large)
    ends = [0]
    for copy in plan.copies:
        assert copy.slab_offset >= ends[-1]
        ends.append(copy.slab_offset + copy.nbytes)
    assert plan.nbytes == ends[-1] < sum(copy.nbytes for copy in plan.copies) + len(ends) * (BLOCK_BYTES + 64)


@pytest.mark.parametrize("direct_io", [None, True, False])
def test_setting_decides(room: Path, monkeypatch: pytest.MonkeyPatch, direct_io: bool | None) -> None:
    directory = room / "run"
    directory.mkdir()
    monkeypatch.setattr(direct, "is_worth_it", lambda directory_fd: False)
    state = {"big": torch.arange(6.0 * MIB)}
    info = run(replace(make_task(directory, state), writing=Writing(direct_io=direct_io))).info
    cached = sum(map(num_cached, Path(info.path).glob("__0_[0-9].distcp")))
    assert cached < 10 if direct_io else cached * BLOCK_BYTES >= 24 * MIB


@pytest.mark.remains
def test_full_disk_names_the_file(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir.mkdir()
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(FileSink, "_open_direct", lambda self, file: full)
    job = replace(make_task(run_dir, {"big": torch.arange(6.0 * MIB)}), writing=Writing(direct_io=True))
    with pytest.raises(StorageError, match=r"__0_0\.distcp.*No space left"):
        run(job)
    os.close(full)
    assert not [path for path in run_dir.iterdir() if path.name.startswith("step_")]
