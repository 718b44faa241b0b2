"""``python -m tests.benchmarks.ranks``: what a save costs a training loop of 1, 2 and 4 ranks.

Each rank is a process with one thread; the model is FSDP2 over gloo, so that every step waits for all ranks, and a rank that
is held up holds up all. Stretches of steps with one save at their beginning and stretches without alternate (A B, B A, ...);
the cost of a save is the median of the differences, in milliseconds, with its standard error. Beside it: the time that the
training thread spent in ``save()``, the most of any rank.

``stager-replicated`` keeps each snapshot with a partner, too, on the same host here. The peer is ``dcp.async_save`` with its
thread, which is called in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stager import Checkpointer

_WARMUP_SAVES = 2
_BATCH = 16

Save = Callable[[int], Callable[[], None]]
"""Begins a save; what it returns waits until that is stored."""


def _model(mib: int) -> nn.Module:
    """So that parameters and AdamW's state take ``mib`` MiB."""
    width = max(64, int((mib * (1 << 20) / 12 / 4) ** 0.5) // 4 * 4)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))


def _stager(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, directory: Path, **sections: Any
) -> tuple[Save, Callable[[], None]]:
    ckpt = Checkpointer(directory / "run", {"workers": {"count": 1}, "retention": {"keep_latest": 1}, **sections})
    ckpt.guard(optimizer)
    ckpt.warmup(state)

    def save(step: int) -> Callable[[], None]:
        handle = ckpt.save(step, state)
        return lambda: _wait(handle.upload_completion.result)

    return save, ckpt.close


def _replicated(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, directory: Path
) -> tuple[Save, Callable[[], None]]:
    return _stager(state, optimizer, directory, replication={"partners": 1})


def _wait(result: Callable[[], object]) -> None:
    result()


def _dcp(state: dict[str, Any], optimizer: torch.optim.Optimizer, directory: Path) -> tuple[Save, Callable[[], None]]:
    group = dist.new_group(backend="gloo")

    def save(step: int) -> Callable[[], None]:
        plain = {name: value.state_dict() for name, value in state.items()}
        future: Any = dcp.async_save(plain, checkpoint_id=str(directory / f"step-{step}"), process_group=group)

        def wait() -> None:
            future.result()
            dist.barrier(group)
            if dist.get_rank() == 0:
                shutil.rmtree(directory / f"step-{step}", ignore_errors=True)

        return wait

    return save, lambda: None


PEERS = {"stager": _stager, "stager-replicated": _replicated, "dcp-thread": _dcp}


def _rank(rank: int, num_ranks: int, peer: str, mib: int, pairs: int, stretch: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=300)
    )
    torch.manual_seed(0)
    model = _model(mib)
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (num_ranks,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (num_ranks,)))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(_BATCH, next(iter(model.parameters())).shape[1])

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    state = {"model": model, "optimizer": optimizer}
    save, close = PEERS[peer](state, optimizer, Path(directory))
    number = 0
    for _ in range(_WARMUP_SAVES):
        number += 1
        wait = save(number)
        step()
        wait()
    with_save, without, blocked = [], [], []
    for pair in range(pairs):
        for saves in (True, False) if pair % 2 else (False, True):
            dist.barrier()
            started = time.perf_counter()
            wait = None
            if saves:
                number += 1
                wait = save(number)
                blocked.append(time.perf_counter() - started)
            for _ in range(stretch):
                step()
            (with_save if saves else without).append(time.perf_counter() - started)
            if wait is not None:
                wait()
            os.sync()
    close()
    everyone: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyone, blocked)
    if rank == 0:
        differences = [a - b for a, b in zip(with_save, without, strict=True)]
        result = {
            "ranks": num_ranks,
            "peer": peer,
            "step_ms": 1e3 * statistics.median(without) / stretch,
            "cost_ms": 1e3 * statistics.median(differences),
            "cost_error_ms": 1e3 * _error(differences),
            "blocked_ms": 1e3 * statistics.median(map(max, zip(*everyone, strict=True))),
        }
        Path(directory, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(
        0
    )  # the groups that meshes hold are destroyed at interpreter exit, and now and then abort there (torch 2.13)


def _error(values: list[float]) -> float:
    """Standard error of the median, as if the values were normal."""
    return 1.2533 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def measure(num_ranks: int, peer: str, mib: int, pairs: int, stretch: int) -> dict[str, Any]:
    directory = tempfile.mkdtemp(prefix="stager-ranks-")
    try:
        arguments = (num_ranks, peer, mib, pairs, stretch, directory)
        mp.start_processes(
            _rank, arguments, nprocs=num_ranks, start_method="fork"
        )  # torch is imported, and no thread runs
        result: dict[str, Any] = json.loads(Path(directory, "result.json").read_text())
        return result
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, comma-separated")
    parser.add_argument("--peer", action="append", choices=sorted(PEERS))
    parser.add_argument("--mib", type=int, default=256, help="of parameters and optimizer state, all ranks together")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--stretch", type=int, default=12, help="training steps in a stretch")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    options = parser.parse_args(arguments)
    results = [
        measure(num_ranks, peer, options.mib, options.pairs, options.stretch)
        for num_ranks in map(int, options.ranks.split(","))
        for peer in options.peer or PEERS
        if num_ranks > 1 or peer != "stager-replicated"
    ]
    print("| ranks | peer | step ms | cost of a save ms | blocked ms |\n| --- | --- | --- | --- | --- |")
    for one in results:
        print(
            f"| {one['ranks']} | {one['peer']} | {one['step_ms']:.1f} | {one['cost_ms']:.1f} ± {one['cost_error_ms']:.1f} | "
            f"{one['blocked_ms']:.1f} |"
        )
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
