"""What torch does when a storage goes into shared memory, and what is left where it is."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stager.sharing import movable
from stager.sharing.movable import Reason, move, sendable, why_not

N = 1 << 18  # float32: 1 MiB


def test_views_aliases_optimizer_state_and_autograd_see_the_moved_memory() -> None:
    parameter = torch.nn.Parameter(torch.arange(float(N)))
    view, alias = parameter.detach()[10:20], parameter.detach()
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    parameter.grad = torch.ones(N)
    optimizer.step()
    momentum = optimizer.state[parameter]["momentum_buffer"]
    loss = (parameter * parameter).sum()  # saves the parameter for its backward
    storage, address = parameter.untyped_storage(), parameter.data_ptr()
    assert move(storage) is None and move(momentum.untyped_storage()) is None

    assert parameter.data_ptr() != address and parameter.is_shared() and momentum.is_shared()
    assert parameter.untyped_storage()._cdata == storage._cdata
    assert view.data_ptr() == parameter.data_ptr() + 40 and alias.data_ptr() == parameter.data_ptr()
    assert torch.equal(view, torch.arange(9.0, 19.0))
    parameter.grad = None
    loss.backward()
    assert torch.equal(parameter.grad, 2 * parameter.detach())
    optimizer.step()
    assert torch.equal(view, alias[10:20]) and torch.equal(momentum, 0.9 * torch.ones(N) + parameter.grad)


def test_old_memory_is_freed() -> None:
    tensor = torch.ones(64 << 20, dtype=torch.uint8)
    before = anonymous_bytes()
    assert move(tensor.untyped_storage()) is None
    assert before - anonymous_bytes() > 60 << 20


def anonymous_bytes() -> int:
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what earlier tests have freed may have been taken for the tensor, and kept after it
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def test_growing_a_moved_storage_raises_and_does_not_crash() -> None:
    tensor = torch.ones(N)
    assert move(tensor.untyped_storage()) is None
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.untyped_storage().resize_(8 * N)
    assert tensor.sum() == N


class Subclass(torch.Tensor):
    pass


def numpy_was_taken() -> torch.Tensor:
    tensor = torch.ones(N)
    tensor.numpy()
    return tensor


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.from_numpy(np.ones(N, np.float32)), Reason.UNMOVABLE),
        (numpy_was_taken, Reason.UNMOVABLE),
        (lambda: torch.from_dlpack(np.ones(N, np.float32)), Reason.UNMOVABLE),
        (lambda: torch.frombuffer(bytearray(4 * N), dtype=torch.float32), Reason.UNMOVABLE),
        (lambda: torch.ones(N).as_subclass(Subclass), Reason.SUBCLASS),
        (lambda: torch.ones(N), None),
        (lambda: torch.nn.Parameter(torch.ones(N)), None),
    ],
)
def test_memory_that_is_not_torchs_alone_may_not_be_moved(
    make: Callable[[], torch.Tensor], reason: Reason | None
) -> None:
    assert why_not(make()) is reason


@pytest.mark.parametrize("shared", [True, False])
def test_mapped_file_counts_as_shared_in_torch_and_is_not_sendable(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(4 * N))
    storage = torch.from_file(str(path), shared=shared, size=N).untyped_storage()
    assert storage.is_shared()
    assert sendable([storage]) == [Reason.UNMOVABLE]


def test_mapped_checkpoint_may_not_be_moved(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(N)}, tmp_path / "mapped.pt")
    loaded = torch.load(tmp_path / "mapped.pt", mmap=True)["w"]
    assert why_not(loaded) is Reason.UNMOVABLE


def test_storages_with_a_descriptor_are_sendable_where_they_are() -> None:
    shared = torch.ones(N).share_memory_()
    moved = torch.ones(N)
    assert move(moved.untyped_storage()) is None
    addresses = [shared.data_ptr(), moved.data_ptr()]
    assert sendable([shared.untyped_storage(), moved.untyped_storage()]) == [None, None]
    assert [shared.data_ptr(), moved.data_ptr()] == addresses


def test_too_little_room_leaves_the_storage_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(N)
    address = tensor.data_ptr()
    monkeypatch.setattr(movable, "free_shm_bytes", lambda: 4 * N - 1)
    assert move(tensor.untyped_storage()) is Reason.NO_ROOM
    assert tensor.data_ptr() == address and not tensor.is_shared()
    monkeypatch.setattr(movable, "free_shm_bytes", lambda: 4 * N)
    assert move(tensor.untyped_storage()) is None


def test_shm_that_is_not_there_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movable, "SHM_DIRECTORY", "/nonexistent")
    assert movable.free_shm_bytes() == 0


_SMALL_SHM = """
import os, torch
from stager.sharing import movable
tensor = torch.ones(1 << 20)
assert movable.move(tensor.untyped_storage()) is movable.Reason.NO_ROOM
movable.free_shm_bytes = lambda: 1 << 40  # somebody else took it in between
assert movable.move(tensor.untyped_storage()) is movable.Reason.REFUSED
assert tensor.sum() == 1 << 20 and not tensor.is_shared()
assert os.listdir("/dev/shm") == []
"""


def test_full_dev_shm_is_survived_and_nothing_is_left_in_it() -> None:
    """With a real one of 2 MiB, in a mount namespace of its own."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    try:
        subprocess.run([*namespace, "sh", "-c", mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine allows no mount namespaces")
    script = f'{mount} && exec "$0" -c "$1"'
    subprocess.run([*namespace, "sh", "-c", script, sys.executable, _SMALL_SHM], check=True)


def test_killed_process_leaves_nothing_in_dev_shm() -> None:
    before = set(os.listdir(movable.SHM_DIRECTORY))
    script = (
        "import os, signal, torch\n"
        "from stager.sharing.movable import move\n"
        "tensors = [torch.ones(1 << 18) for _ in range(5)]\n"
        "assert not any(move(t.untyped_storage()) for t in tensors)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert set(os.listdir(movable.SHM_DIRECTORY)) <= before
