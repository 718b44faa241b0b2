"""Runs a function of the tests on several ranks of a gloo group, each a process of its own."""

from __future__ import annotations

import importlib
import json
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import fork_server
from tests.staging.child import environment

_DEADLINE_SECS = 120.0


def run_ranks(target: str, world_size: int, directory: Path, *args: Any) -> list[Any]:
    """What ``target(rank, directory, *args)`` returned on each rank; None for a rank that was killed."""
    server = fork_server.shared()
    output = directory / "ranks.log"
    module = target.partition(":")[0]
    pids: list[int] = []
    try:
        for rank in range(world_size):
            arguments = [target, rank, world_size, str(directory), list(args)]
            function = f"{__name__}:become_rank"
            pids.append(
                server.start(
                    function, arguments, stdout=output, stderr=output, environment=environment(), modules=[module]
                )
            )
        deadline = time.monotonic() + _DEADLINE_SECS
        for pid in pids:
            server.wait(pid, max(0.0, deadline - time.monotonic()))
    finally:
        for pid in pids:
            server.kill(pid)
    said = output.read_text()
    output.unlink()
    paths = [directory / f"result-{rank}.json" for rank in range(world_size)]
    results = [json.loads(path.read_text()) if path.exists() else None for path in paths]
    failures = [result["error"] for result in results if result is not None and "error" in result]
    assert not failures, "\n".join([*failures, said])
    return [None if result is None else result["value"] for result in results]


def become_rank(target: str, rank: int, world_size: int, directory: str, args: list[Any]) -> None:
    """In the rank's process."""
    warnings.simplefilter("ignore")  # as PYTHONWARNINGS says: this interpreter began before it was set
    try:
        result = _run_rank(target, rank, world_size, directory, args)
        temporary = Path(directory, f"result-{rank}.tmp")
        temporary.write_text(json.dumps(result))
        temporary.rename(Path(directory, f"result-{rank}.json"))
    finally:
        fork_server.exit_now()


def _run_rank(target: str, rank: int, world_size: int, directory: str, args: list[Any]) -> dict[str, Any]:
    store = f"file://{directory}/store"
    try:
        module, name = target.split(":")
        function = getattr(importlib.import_module(module), name)
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        value = function(rank, directory, *args)
        dist.destroy_process_group()
    except Exception:  # noqa: BLE001  # the process's edge: it goes to the test as text
        return {"error": f"rank {rank}:\n{traceback.format_exc()}"}
    return {"value": value}
