"""Shared staging of many tensors: few descriptors, sent without a copy, nothing left behind."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

import torch
import torch.multiprocessing as mp

from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.memory.host_buffers import HostBuffers, SharedSlice
from tests import scripts
from tests.observed import shm_names
from tests.staging.child import run


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def many_tensors(which: str) -> dict[str, Any]:
    """Runs in a child with 1,024 descriptors: stage 20,000 tensors and send them to a process that adds one to each."""
    from torch.distributed.checkpoint._state_dict_stager import StateDictStager as TorchStager

    source = {str(index): torch.full((256,), float(index)) for index in range(20_000)}
    before = open_fds()
    stager = (TorchStager if which == "torch" else StateDictStager)(share_memory=True)
    try:
        staged = stager.stage(source)
    except (OSError, RuntimeError) as error:
        return {"error": str(error)}
    result = {
        "shared": all(tensor.is_shared() for tensor in staged.values()),
        "equal": all(torch.equal(tensor, source[key]) for key, tensor in staged.items()),
        "fds": open_fds() - before,
        "shm": len(shm_names(os.getpid())),
    }
    context = mp.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=add_one, args=(theirs,))
    process.start()
    theirs.close()
    ours.send(staged)
    result["reply"] = ours.recv()
    process.join()
    result["seen_here"] = all(torch.equal(tensor, source[key] + 1) for key, tensor in staged.items())
    return result


def add_one(connection: Any) -> None:
    staged = connection.recv()
    for tensor in staged.values():
        tensor.add_(1)
    connection.send({"shared": staged["7"].is_shared(), "fds": open_fds()})


def test_20000_tensors_under_1024_descriptors() -> None:
    result = run("tests.staging.test_shared_memory:many_tensors", "stager", nofile=1024)
    reply = result.pop("reply")
    assert result == {"shared": True, "equal": True, "fds": result["fds"], "shm": 0, "seen_here": True}
    assert result["fds"] <= 8
    assert reply["shared"]
    assert reply["fds"] < 40


def test_20000_tensors_are_too_many_for_torch() -> None:
    result = run("tests.staging.test_shared_memory:many_tensors", "torch", nofile=1024)
    assert "open files" in result["error"]


def test_large_storages_beyond_the_budget_share_mappings() -> None:
    buffers = HostBuffers(shared=True, fd_budget=4)
    before = open_fds()
    storages = [buffers.new(1 << 20) for _ in range(40)]
    assert open_fds() - before <= 9
    assert len({storage.data_ptr() for storage in storages}) == 40
    assert all(storage.is_shared() for storage in storages)
    del storages
    buffers.drop()
    assert open_fds() == before


def test_large_storages_within_the_budget_are_torchs_own() -> None:
    storage = HostBuffers(shared=True).new(1 << 20)
    assert type(storage) is torch.UntypedStorage
    assert storage.is_shared()
    assert storage.nbytes() == 1 << 20


def test_slices_do_not_overlap_and_are_aligned() -> None:
    buffers = HostBuffers(shared=True)
    storages = [buffers.new(nbytes) for nbytes in (1, 63, 64, 65, 1000, 0, 4096)]
    ranges = sorted((s.data_ptr(), s.nbytes()) for s in storages if s.nbytes())
    assert all(start % 64 == 0 for start, _ in ranges)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges))


def test_slice_stays_a_slice_while_only_a_tensor_holds_it() -> None:
    tensor = StateDictStager(share_memory=True).stage(torch.ones(3))
    assert type(tensor.untyped_storage()) is SharedSlice
    assert tensor.share_memory_().data_ptr() == tensor.data_ptr()
    assert not tensor.clone().is_shared()


KILLED = """
import os, torch
from stager.torch_api.staging.state_dict_stager import StateDictStager
source = [torch.ones(256) for _ in range(2000)] + [torch.ones(1 << 19) for _ in range(4)]
staged = StateDictStager(share_memory=True).stage(source)
print("staged", flush=True)
import signal; signal.pause()
"""


def test_sigkill_leaves_no_name_in_dev_shm() -> None:
    with scripts.running(KILLED) as program:
        assert program.stdout.readline() == "staged\n"
        program.kill(signal.SIGKILL)
        program.wait()
    assert shm_names(program.pid) == []
