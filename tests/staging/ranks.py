"""Runs a function of the tests on several ranks of a gloo group, each a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.staging.child import run

_DEADLINE_SECS = 120.0


def run_ranks(target: str, world_size: int, directory: Path, *args: Any) -> list[Any]:
    """What ``target(rank, directory, *args)`` returned on each rank; None for a rank that was killed."""
    results: list[Any] = run("tests.staging.ranks:launch", target, world_size, str(directory), list(args))
    failures = [result["error"] for result in results if isinstance(result, dict) and "error" in result]
    assert not failures, "\n".join(failures)
    return [None if result is None else result["value"] for result in results]


def launch(target: str, world_size: int, directory: str, args: list[Any]) -> list[Any]:
    """In a fresh process that has imported everything and started no thread: fork the ranks and wait for them."""
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    pids = [_fork(function, rank, world_size, directory, args) for rank in range(world_size)]
    deadline = time.monotonic() + _DEADLINE_SECS
    for pid in pids:
        ended = os.pidfd_open(pid)
        assert select.select([ended], [], [], max(0.0, deadline - time.monotonic()))[0], "a rank did not end in time"
        os.close(ended)
        os.waitpid(pid, 0)
    paths = [Path(directory, f"result-{rank}.json") for rank in range(world_size)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def _fork(function: Any, rank: int, world_size: int, directory: str, args: list[Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        result = _run_rank(function, rank, world_size, directory, args)
        temporary = Path(directory, f"result-{rank}.tmp")
        temporary.write_text(json.dumps(result))
        temporary.rename(Path(directory, f"result-{rank}.json"))
    finally:
        sys.stdout.flush()
        os._exit(0)


def _run_rank(function: Any, rank: int, world_size: int, directory: str, args: list[Any]) -> dict[str, Any]:
    store = f"file://{directory}/store"
    try:
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        value = function(rank, directory, *args)
        dist.destroy_process_group()
    except Exception:  # noqa: BLE001  # the process's edge: it goes to the test as text
        return {"error": f"rank {rank}:\n{traceback.format_exc()}"}
    return {"value": value}
