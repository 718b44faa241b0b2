"""``python -m tests.benchmarks.replication``: how long a snapshot takes to a partner, and a job to go on from there.

Each rank is a process with one thread and has ``--mib`` MiB of its own. A first job saves and fails; others then begin, one
for each row and round, in turn:

    disk, cold     the checkpoint is on the disk; its files are not in the page cache
    disk, warm     they are
    memory         the checkpoint is gone from the disk: it is written from the partners' memory, synced, committed, loaded

``open`` is making the ``Checkpointer``, ``load`` is ``load(into=)``, the most of any rank. Medians over the rounds, in
seconds. What a save costs a training loop with replication is measured by ``tests.benchmarks.ranks``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stager import Checkpointer, PerRank
from stager.ranks import keys
from stager.ranks.messages import ReplicaFate

_SAVES = 5
_TENSORS = 24
_MODES = ("disk, cold", "disk, warm", "memory")


class _FailError(Exception):
    """Ends a job so that it leaves its replicas."""


def _begin(rank: int, num_ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("stager").setLevel(logging.ERROR)  # restoring is what is measured, and warned about
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=300)
    )


def _open(directory: str, memory: str) -> Checkpointer:
    replication = {"partners": 1, "directory": memory}
    return Checkpointer(Path(directory, "run"), {"workers": {"count": 1}, "replication": replication})


def _state(mib: int, value: float) -> dict[str, Any]:
    return {
        "own": PerRank({f"w{i}": torch.full((max(1, mib * (1 << 18) // _TENSORS),), value) for i in range(_TENSORS)})
    }


def _save(rank: int, num_ranks: int, directory: str, memory: str, mib: int) -> None:
    """How long each snapshot took to the partner, after it was staged."""
    _begin(rank, num_ranks, directory)
    secs = []
    with suppress(_FailError), _open(directory, memory) as ckpt:
        group = ckpt._group
        for step in range(1, _SAVES + 1):
            dist.barrier()
            handle = ckpt.save(step, _state(mib, float(step)))
            handle.upload_completion.result()
            while group.read(keys.replica_fate(handle.save_id)) != ReplicaFate(is_whole=True):
                time.sleep(0.005)
            sent = [timing for timing in handle.report.timings if timing.name == "replicate"]
            secs += [event.end - event.start for event in sent]
        raise _FailError
    _end(rank, directory, secs)


def _resume(rank: int, num_ranks: int, directory: str, memory: str, mib: int) -> None:
    _begin(rank, num_ranks, directory)
    state = _state(mib, 0.0)
    dist.barrier()
    started = time.perf_counter()
    with suppress(_FailError), _open(directory, memory) as ckpt:
        opened = time.perf_counter()
        loaded = ckpt.load(into=state)
        done = time.perf_counter()
        assert loaded is not None and loaded.step == _SAVES
        assert all(bool((value == _SAVES).all()) for value in state["own"].value.values())
        raise _FailError
    _end(rank, directory, [opened - started, done - opened])


def _end(rank: int, directory: str, result: list[float]) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, result)
    if rank == 0:
        Path(directory, "result.json").write_text(json.dumps([max(values) for values in zip(*everyone, strict=True)]))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort at interpreter exit (torch 2.13)


def _job(body: Any, num_ranks: int, directory: str, *arguments: Any) -> list[float]:
    Path(directory, "store").unlink(missing_ok=True)
    # Torch is imported, and no thread runs.
    mp.start_processes(body, (num_ranks, directory, *arguments), nprocs=num_ranks, start_method="fork")
    result: list[float] = json.loads(Path(directory, "result.json").read_text())
    return result


def _prepare(mode: str, directory: str) -> None:
    """The disk as the mode has it. The newest checkpoint was restored by the round before, if that removed it."""
    newest = Path(directory, "run", f"step-{_SAVES:08d}")
    if mode == "memory":
        shutil.rmtree(newest)
    for path in newest.rglob("*") if newest.exists() else ():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if mode == "disk, warm":
                while file.read(8 << 20):
                    pass


def measure(num_ranks: int, mib: int, rounds: int, memory: str) -> dict[str, Any]:
    directory = tempfile.mkdtemp(prefix="stager-replication-")
    kept = tempfile.mkdtemp(prefix="stager-replication-", dir=memory)
    try:
        sent = _job(_save, num_ranks, directory, kept, mib)
        times: dict[str, list[list[float]]] = {mode: [] for mode in _MODES}
        for number in range(rounds):
            for mode in sorted(_MODES, key=lambda mode: hash((mode, number))):
                _prepare(mode, directory)
                times[mode].append(_job(_resume, num_ranks, directory, kept, mib))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(kept, ignore_errors=True)
    warm = sent[2:]  # the first two fill the partner's two buffers, which are new
    return {
        "ranks": num_ranks,
        "mib": mib,
        "to_partner_first_secs": sent[0],
        "to_partner_secs": statistics.median(warm),
        "to_partner_mib_per_sec": mib / statistics.median(warm),
        "resume": {
            mode: {
                "open_secs": statistics.median(one[0] for one in values),
                "load_secs": statistics.median(one[1] for one in values),
                "both_secs": statistics.median(sum(one) for one in values),
                "range_secs": [min(map(sum, values)), max(map(sum, values))],
            }
            for mode, values in times.items()
        },
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2", help="numbers of ranks, comma-separated")
    parser.add_argument("--mib", type=int, default=512, help="of each rank's state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="/dev/shm", help="replication.directory")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    options = parser.parse_args(arguments)
    results = [
        measure(num_ranks, options.mib, options.rounds, options.memory)
        for num_ranks in map(int, options.ranks.split(","))
    ]
    for one in results:
        print(
            f"{one['ranks']} ranks, {one['mib']} MiB each: to the partner in {one['to_partner_secs']:.3f} s "
            f"({one['to_partner_mib_per_sec']:.0f} MiB/s), the first in {one['to_partner_first_secs']:.3f} s\n"
        )
        print("| a new job goes on from | open | load | both | range |\n| --- | ---: | ---: | ---: | --- |")
        for mode, secs in one["resume"].items():
            low, high = secs["range_secs"]
            print(
                f"| {mode} | {secs['open_secs']:.2f} | {secs['load_secs']:.2f} | {secs['both_secs']:.2f} | "
                f"{low:.2f} to {high:.2f} |"
            )
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
