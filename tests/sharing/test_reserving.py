"""``/dev/shm`` that fills between the check of its free space and the move: the trainer copies, and does not die.

torch before 2.10 is emulated: a library that is loaded first refuses to reserve pages, and torch then goes on without, as
these versions do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stager.sharing.movable import Reason, torch_reserves

_RESERVE_NOTHING = """
#include <errno.h>
int posix_fallocate(int fd, long offset, long nbytes) { errno = EOPNOTSUPP; return EOPNOTSUPP; }
int posix_fallocate64(int fd, long offset, long nbytes) { errno = EOPNOTSUPP; return EOPNOTSUPP; }
"""

_MOVE = """
import sys, torch
from stager.sharing import movable
movable.free_shm_bytes = lambda: 1 << 40  # what was free when it was asked for
if "trust" in sys.argv:
    movable.torch_reserves = lambda: True
storage = torch.ones(32 << 20, dtype=torch.uint8).untyped_storage()
print(movable.move(storage).name, storage.is_shared(), int(torch.empty(0, dtype=torch.uint8).set_(storage).sum()))
"""


@pytest.fixture(scope="module")
def old_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes this torch one that reserves nothing."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    directory = tmp_path_factory.mktemp("library")
    source, library = directory / "nothing.c", directory / "nothing.so"
    source.write_text(_RESERVE_NOTHING)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def move(preload: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Move 32 MiB where ``/dev/shm`` is a tmpfs of 16."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can mount a small file system")
    mount = 'mount -t tmpfs -o size=16m stager-test /dev/shm && exec "$@"'
    command = [
        "unshare",
        "-m",
        "--propagation",
        "private",
        "sh",
        "-c",
        mount,
        "sh",
        sys.executable,
        "-c",
        _MOVE,
        *arguments,
    ]
    environ = {**os.environ, **({"LD_PRELOAD": str(preload)} if preload else {})}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environ, cwd=Path(__file__).parents[2]
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this container may not mount a file system")
    return done


def copied_by_the_trainer(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    reason, shared, total = done.stdout.split()
    assert (shared, total) == ("False", str(32 << 20))  # where it was, and whole
    return reason


@pytest.mark.long
def test_torch_that_does_not_reserve_is_not_asked_to_move(old_torch: Path) -> None:
    assert copied_by_the_trainer(move(old_torch)) == Reason.NOT_RESERVED.name


@pytest.mark.long
def test_move_by_torch_that_does_not_reserve_would_end_the_process(old_torch: Path) -> None:
    """Otherwise the test above shows nothing."""
    assert move(old_torch, "trust").returncode == -signal.SIGBUS


@pytest.mark.skipif(not torch_reserves(), reason="this torch reserves nothing")
def test_torch_that_reserves_refuses_the_move() -> None:
    assert copied_by_the_trainer(move(None)) == Reason.REFUSED.name
