"""The table of docs/faults.md: what a file system does to a save, through a ``Checkpointer`` and real workers.

Each row: the error that the user sees, with errno, path and advice; the earlier checkpoint verifies; nothing partial is
left; the next save works. System call by system call, without workers: ``tests/persistence/test_storage_errors.py``.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stager import Checkpointer, StorageError
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests import scripts
from tests.faults import Faults
from tests.small_disk import small_disk_at
from tests.states import same

CONFIG = {"workers": {"count": 1}}
OLD, NEW = {"x": torch.zeros(100)}, {"x": torch.ones(100), "o": {"a": 1}}

_ADVICE = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "quota",
    errno.EIO: "dmesg",
    errno.EROFS: "mounted read-only",
    errno.EACCES: "owner and mode",
    errno.ESTALE: "remount",
    errno.EMFILE: "ulimit -n",
}
_PLACES = {  # a point, and what of the path is named
    "part.begin": "partial-",
    "part.write": "distcp",
    "part.sync": "distcp",
    "commit.begin": "step-",
    "commit.indexed": "step-",
    "commit.manifest": "step-",
}


def save_fails(ckpt: Checkpointer, step: int, code: int, advice: str) -> StorageError:
    """The next save ends in a StorageError of this errno, which says what to do."""
    with pytest.raises(StorageError) as raised:
        ckpt.save(step, NEW).upload_completion.result()
    error = raised.value
    assert error.errno == code and advice in str(error) and os.strerror(code) in str(error)
    return error


def nothing_is_harmed(ckpt: Checkpointer, run_dir: Path, *, next_step: int = 9) -> None:
    """The earlier checkpoint verifies, nothing partial is left, the next save works."""
    assert not list(run_dir.glob("*partial*"))
    latest = ckpt.latest()
    assert latest is not None and verify_checkpoint(latest.path).ok and not ckpt.skipped
    info = ckpt.save(next_step, NEW).upload_completion.result()
    assert verify_checkpoint(info.path).ok
    loaded = ckpt.load(next_step)
    assert loaded is not None and same(loaded.state, NEW)


def test_each_error_at_each_place(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
        for place, named in _PLACES.items():
            for code, advice in _ADVICE.items():
                faults.arm(place, f"errno {errno.errorcode[code]}")
                error = save_fails(ckpt, 1, code, advice)
                assert named in error.path and error.path.startswith(str(run_dir)), place
                assert [info.step for info in ckpt.checkpoints()] in ([0], [0, 9])
                assert not list(run_dir.glob("*partial*"))
            nothing_is_harmed(ckpt, run_dir)
        assert not list(faults.directory.glob("*.*"))  # each was reached


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", 4 << 20) as mount:
        yield mount


def test_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    run_dir = small_disk / "run"
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
        ballast = small_disk / "ballast"
        _fill(ballast)
        with pytest.raises(
            StorageError, match=r"does not fit the .* bytes that are free; nothing was written"
        ) as raised:
            ckpt.save(1, NEW)
        assert raised.value.errno == errno.ENOSPC
        ballast.unlink()
        nothing_is_harmed(ckpt, run_dir)


def test_disk_that_fills_up_in_the_middle_of_a_save(small_disk: Path, faults: Faults) -> None:
    """Somebody else writes, after the free space was checked."""
    run_dir = small_disk / "run"
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
        hold = faults.hold("part.opened")
        handle = ckpt.save(1, {"x": torch.ones(1 << 18)})
        hold.wait()
        ballast = small_disk / "ballast"
        _fill(ballast)
        hold.release()
        with pytest.raises(StorageError, match="free space on this file system") as raised:
            handle.upload_completion.result()
        assert raised.value.errno == errno.ENOSPC
        ballast.unlink()
        nothing_is_harmed(ckpt, run_dir)


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_file_system_that_is_mounted_read_only(small_disk: Path) -> None:
    """A run that starts on it; a reader, who does not mind."""
    run_dir = small_disk / "run"
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="mounted read-only") as raised:
        Checkpointer(run_dir, CONFIG)
    assert raised.value.errno == errno.EROFS and raised.value.path.startswith(str(run_dir))
    with Checkpointer(run_dir, read_only=True) as reader:
        loaded = reader.load()
        assert loaded is not None and same(loaded.state, OLD)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with Checkpointer(run_dir, CONFIG) as ckpt:
        nothing_is_harmed(ckpt, run_dir)


def test_run_directory_that_is_removed_meanwhile(run_dir: Path) -> None:
    """It is not made again, for nobody would hold its lock; a new run may."""
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
        shutil.rmtree(run_dir)
        error = save_fails(ckpt, 1, errno.ENOENT, "was removed or renamed")
        assert error.path == str(run_dir) and not run_dir.exists()
        assert ckpt.latest() is None
    with Checkpointer(run_dir, CONFIG) as ckpt:
        assert ckpt.save(1, NEW).upload_completion.result().step == 1


def test_run_directory_that_is_removed_while_a_worker_is_about_to_write(run_dir: Path, faults: Faults) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        hold = faults.hold("part.begin")
        handle = ckpt.save(1, NEW)
        hold.wait()
        shutil.rmtree(run_dir)
        hold.release()
        with pytest.raises(StorageError, match="removed") as raised:
            handle.upload_completion.result()
        assert raised.value.errno == errno.ENOENT


def test_file_in_the_place_of_the_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="move it away, or use another directory") as raised:
            Checkpointer(path, CONFIG)
        assert raised.value.errno in (errno.ENOTDIR, errno.EEXIST) and raised.value.path == str(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_something_else_in_the_place_of_a_checkpoint_is_moved_aside(run_dir: Path, tmp_path: Path) -> None:
    """It is no checkpoint, so it is not ours to remove, nor does it stop the save."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes").write_text("mine")
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
        (run_dir / "step-00000001").write_text("mine")
        shutil.copytree(elsewhere, run_dir / "step-00000002")
        (run_dir / "step-00000003").symlink_to(elsewhere)
        for step, kept in (1, "."), (2, "notes"), (3, "notes"):
            final = run_dir / f"step-{step:08d}"
            assert ckpt.save(step, NEW).upload_completion.result().path == str(final)
            (aside,) = run_dir.glob(f"{final.name}.not-a-checkpoint-*")
            assert (aside / kept).read_text() == "mine"
        nothing_is_harmed(ckpt, run_dir)


def test_path_that_is_too_long(tmp_path: Path) -> None:
    deep = tmp_path
    while len(str(deep)) < 4090:
        deep = deep / ("d" * 200)
    for path in (deep, tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="shorter path") as raised:
            Checkpointer(path, CONFIG)
        assert raised.value.errno == errno.ENAMETOOLONG and raised.value.path == str(path)


def test_path_whose_checkpoints_would_be_too_long(tmp_path: Path) -> None:
    """The directory itself can be made; the save says what is wrong."""
    deep = tmp_path
    while len(str(deep)) < 3900:
        deep = deep / ("d" * 80)
    deep = deep / ("e" * (4095 - len(str(deep)) - len("/.stager.lock") - 2))
    with Checkpointer(deep, CONFIG) as ckpt:
        assert "shorter path" in str(save_fails(ckpt, 1, errno.ENAMETOOLONG, "shorter path"))
        assert os.listdir(deep) == [".stager.lock"]


def test_path_that_is_not_utf_8(tmp_path: Path) -> None:
    run_dir = tmp_path / os.fsdecode(b"run-\xff\xfe")
    events = {"telemetry": {"events": str(tmp_path / "events.jsonl")}}
    with Checkpointer(run_dir, {**CONFIG, **events}) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
        nothing_is_harmed(ckpt, run_dir)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def test_clock_that_is_set_back_between_two_saves(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is the one of the highest step, and the last save of a step wins, whatever the dates say."""
    with Checkpointer(run_dir, CONFIG) as ckpt:
        first = ckpt.save(1, OLD).upload_completion.result()
        ckpt.save(2, OLD).upload_completion.result()
        yesterday = time.time() - 86400
        monkeypatch.setattr(time, "time", lambda: yesterday)
        again = ckpt.save(1, NEW).upload_completion.result()
        assert again.created < first.created
        last = ckpt.save(3, NEW).upload_completion.result()
        monkeypatch.undo()
        assert last.created < first.created and ckpt.latest() == last
        loaded = ckpt.load(1)
        assert loaded is not None and same(loaded.state, NEW)
        nothing_is_harmed(ckpt, run_dir)
    assert [info.step for info in list_checkpoints(run_dir)[0]] == [1, 2, 3, 9]


def test_two_runs_in_one_directory(run_dir: Path) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(0, OLD).upload_completion.result()
        ended = scripts.run(
            "from stager import Checkpointer, DirectoryInUseError\n"
            "try:\n"
            f"    Checkpointer({str(run_dir)!r}, {{'persistence': {{'lock_timeout_secs': 0}}}})\n"
            "except DirectoryInUseError as error:\n"
            "    print(error.path, error)\n"
        )
        said = rf"{run_dir} .*another run \(trainer process {os.getpid()}.*use another directory.*read_only=True"
        assert ended.returncode == 0 and re.match(said, ended.stdout)
        nothing_is_harmed(ckpt, run_dir)
