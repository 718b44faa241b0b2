"""Full verification sees every change of every file; quick verification what it promises."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.read.verify import check_files, fingerprint, verify_checkpoint
from stager.workers.errors import CheckpointNotFoundError
from tests.persistence.tasks import save

STATE = {"a": torch.arange(4, dtype=torch.int16), "b": {"c": torch.tensor(1.5), "d": torch.empty(0)}, "e": "text"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed checkpoint of two data files of a few KiB, .metadata and manifest.json."""
    info = save(tmp_path_factory.mktemp("run"), STATE, num_parts=2, num_files=2, segment_bytes=1000)
    assert verify_checkpoint(info.path).ok
    return Path(info.path)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / original.name))


def problems(path: Path, *, full: bool = True, strict: bool = False) -> tuple[str, ...]:
    result = verify_checkpoint(path, full=full, strict=strict, num_threads=1)
    assert result.ok == (not result.problems)
    return result.problems


def test_every_byte_of_every_file(checkpoint: Path) -> None:
    """Each byte in turn, one bit of it flipped."""
    count = 0
    for path in sorted(checkpoint.iterdir()):
        original = path.read_bytes()
        with open(path, "r+b", buffering=0) as file:
            for position, value in enumerate(original):
                os.pwrite(file.fileno(), bytes([value ^ 1 << position % 8]), position)
                found = problems(checkpoint)
                assert found and path.name in found[0], f"{path.name} byte {position}"
                os.pwrite(file.fileno(), bytes([value]), position)
                count += 1
    assert not problems(checkpoint)
    assert count == sum(path.stat().st_size for path in checkpoint.iterdir()) > 7000


def test_every_file_truncated_grown_emptied_missing(checkpoint: Path) -> None:
    for path in sorted(checkpoint.iterdir()):
        original = path.read_bytes()
        for spoiled in (original[:-1], original[: len(original) // 2], b"", original + b"\0"):
            path.write_bytes(spoiled)
            for full in (True, False):
                found = problems(checkpoint, full=full)
                assert found and path.name in found[0], (path.name, len(spoiled), full)
        path.unlink()
        assert path.name in problems(checkpoint)[0]
        path.write_bytes(original)
    assert not problems(checkpoint)


def test_files_that_do_not_belong(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").touch()
    (checkpoint / "sub").mkdir()
    assert problems(checkpoint) == ()
    assert verify_checkpoint(checkpoint).strangers == ("notes.txt", "sub")
    assert problems(checkpoint, full=False, strict=True) == (
        f"{checkpoint / 'notes.txt'}: does not belong to this checkpoint",
        f"{checkpoint / 'sub'}: does not belong to this checkpoint",
    )


def test_two_files_swapped(checkpoint: Path) -> None:
    first, second = sorted(checkpoint.glob("__0_?.distcp"))
    first.rename(checkpoint / "x")
    second.rename(first)
    (checkpoint / "x").rename(second)
    assert problems(checkpoint)


def test_each_damaged_item_is_named_and_not_only_the_first(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.distcp"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    found = problems(checkpoint)
    assert [p.partition("are damaged ")[2].partition(":")[0] for p in sorted(found)] == ["(a)", "(b['d'])", "(e)"]


def _link(path: Path) -> None:
    target = path.parent.parent / "target"
    path.rename(target)
    path.symlink_to(target)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # its address may have 107 bytes
        server.bind(path.name)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp", "__0_objects.distcp"])
@pytest.mark.parametrize("spoil", [_link, _directory, _fifo, _socket, _device], ids=lambda f: f.__name__)
def test_what_is_no_regular_file_is_refused_at_once(
    checkpoint: Path, name: str, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No link is followed, and none of them makes a reader wait."""
    monkeypatch.chdir(checkpoint)
    spoil(checkpoint / name)
    for full in (True, False):
        assert name in problems(checkpoint, full=full)[0]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert "no manifest" in problems(tmp_path)[0]
    assert problems(tmp_path / "none")
    (tmp_path / "file").touch()
    assert problems(tmp_path / "file")
    with pytest.raises(CheckpointNotFoundError):
        read_manifest(tmp_path / "none")


def test_result_counts_what_was_looked_at(original: Path) -> None:
    done: list[int] = []
    before = time.monotonic()
    result = verify_checkpoint(original, progress=done.append)
    elapsed = time.monotonic() - before
    assert result.nbytes == sum(done) == sum(p.stat().st_size for p in original.iterdir()) - _manifest_size(original)
    assert result.num_items == 4 and 0 < result.secs <= elapsed


def _manifest_size(path: Path) -> int:
    return (path / "manifest.json").stat().st_size


def test_unreadable_sector_is_a_problem_and_no_crash(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    assert any("see dmesg" in problem for problem in problems(original))


def _clock_ticks(directory: Path) -> None:
    """Until the file system's clock has moved on: its grain is a few milliseconds."""
    probe = directory.parent / "probe"
    probe.touch()
    first = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == first:
        probe.touch()


def test_fingerprint_sees_every_write(checkpoint: Path) -> None:
    before = fingerprint(str(checkpoint))
    assert fingerprint(str(checkpoint)) == before
    for path in sorted(checkpoint.iterdir()):
        data, times = path.read_bytes(), path.stat()
        _clock_ticks(checkpoint)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the change is hidden as well as can be
        assert fingerprint(str(checkpoint)) != before
        path.write_bytes(data)
        _clock_ticks(checkpoint)
        before = fingerprint(str(checkpoint))


def test_check_files_overlooks_what_does_not_belong(checkpoint: Path) -> None:
    """Recovery looks into directories in which receipts still lie."""
    (checkpoint / "receipt-0-0-of-2.json").touch()
    assert check_files(str(checkpoint), read_manifest(checkpoint), full=True) == []
