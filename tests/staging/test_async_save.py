"""``dcp.async_save(..., async_stager=...)``: threads, processes, many saves with one stager, read back by ``dcp.load``."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from stager.torch_api.staging import BlockingAsyncStager, DefaultStager, StagingOptions, WorkerStager
from tests.observed import child_pids, shm_names
from tests.staging.child import run

HERE = "tests.staging.test_async_save"
STAGERS: dict[str, Any] = {
    "auto": DefaultStager,
    "blocking": lambda: DefaultStager(StagingOptions(False, True, False, False)),
    "async": lambda: DefaultStager(StagingOptions(False, True, True, False)),
    "private": lambda: DefaultStager(StagingOptions(False, False, True, False)),
    "leases": lambda: DefaultStager(StagingOptions(False, True, True, False, use_leases=True)),
    "cached": lambda: BlockingAsyncStager(cache_staged_state_dict=True),
    "uncached": BlockingAsyncStager,
    "workers": WorkerStager,
}


def mutate(state: dict[str, Any], step: int) -> None:
    """The next training step: values change in place, and every third step one tensor changes its shape."""
    for index, tensor in enumerate(state["model"].values()):
        tensor.fill_(step * 100 + index)
    state["model"]["view"].add_(0.5)
    if step % 3 == 0:
        state["grown"] = torch.full((step + 1, 2), float(step))
    state["optimizer"]["step"] = step


def new_state() -> dict[str, Any]:
    base = torch.zeros(64, 8)
    return {
        "model": {"w": base, "view": base[10:20, ::2], "big": torch.zeros(300_000), "scalar": torch.tensor(0.0)},
        "optimizer": {"step": 0, "lr": 0.1, "params": [torch.zeros(5)]},
        "grown": torch.zeros(1, 2),
    }


def saves(kind: str, names: list[str], directory: str, count: int) -> dict[str, Any]:
    """Runs in a child: ``count`` saves with each of the stagers."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    growth = {name: save_many(AsyncCheckpointerType[kind], name, f"{directory}/{name}", count) for name in names}
    _async_process_executor._CHECKPOINT_PROCESS = None  # its __del__ ends the daemon
    gc.collect()
    dist.destroy_process_group()
    children = [" ".join(psutil.Process(pid).cmdline()) for pid in child_pids()]
    return {
        "growth": growth,
        "children": [command for command in children if "resource_tracker" not in command],
        "threads": [thread.name for thread in threading.enumerate() if "staging" in thread.name],
    }


def save_many(kind: AsyncCheckpointerType, name: str, directory: str, count: int) -> dict[str, int]:
    """With leases a save starts while earlier ones are being written. Else each is awaited: without leases buffers are
    shared, and torch's process executor reads the answers of overlapping saves from one pipe with several threads."""
    overlap = 3 if name in ("leases", "workers") and kind is AsyncCheckpointerType.THREAD else 0
    state = new_state()
    pending, expected, census = [], [], []
    with STAGERS[name]() as stager:
        for step in range(count):
            mutate(state, step)
            expected.append(flat(state))
            response = dcp.async_save(
                state, checkpoint_id=f"{directory}/{step}", async_stager=stager, async_checkpointer_type=kind
            )
            pending.append(response.upload_completion if isinstance(response, AsyncSaveResponse) else response)
            stager.synchronize_staging()  # from here on the state may change
            if step >= overlap:
                pending[step - overlap].result()
            census.append(take_census())
        wait_all(pending)
    for step in range(count):
        check(directory, step, expected[step])
    return {key: census[-1][key] - census[count // 2][key] for key in census[-1]}


def wait_all(pending: list[Future[Any]]) -> None:
    for future in pending:
        future.result()


def take_census() -> dict[str, int]:
    return {"fds": len(os.listdir("/proc/self/fd")), "shm": len(shm_names(os.getpid(), *child_pids()))}


def flat(state: dict[str, Any]) -> dict[str, Any]:
    return {
        **{f"model.{key}": value.clone() for key, value in state["model"].items()},
        "grown": state["grown"].clone(),
        "step": state["optimizer"]["step"],
    }


def check(directory: str, step: int, expected: dict[str, Any]) -> None:
    loaded = new_state()
    loaded["grown"] = torch.zeros_like(expected["grown"])
    loaded["optimizer"]["step"] = -1
    dcp.load(loaded, checkpoint_id=f"{directory}/{step}")
    got = flat(loaded)
    for key, value in expected.items():
        assert torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value, (step, key)


def assert_clean(result: dict[str, Any]) -> None:
    assert result["children"] == []
    assert result["threads"] == []
    for name, growth in result["growth"].items():
        assert growth["shm"] <= 0, name
        assert growth["fds"] <= 4, name


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("THREAD", list(STAGERS)),
        pytest.param("PROCESS", ["async", "leases", "cached", "workers"], marks=pytest.mark.long),
    ],
)
def test_saves_in_a_row(kind: str, names: list[str], tmp_path: Path) -> None:
    assert_clean(run(f"{HERE}:saves", kind, names, str(tmp_path), 7))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["THREAD", "PROCESS"])
def test_100_saves_with_one_stager(kind: str, tmp_path: Path) -> None:
    assert_clean(run(f"{HERE}:saves", kind, ["async", "leases", "workers"], str(tmp_path), 100))
