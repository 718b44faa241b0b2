"""``python -m tests.benchmarks.many_tensors``: what each of many small tensors costs: time, memory, objects.

For each number of tensors, in a process of its own, without ``warmup()``:

    first, later   milliseconds until ``save()`` returned: the first save of the process; median and most of the next ones
    stored         milliseconds until the last save was committed, with ``fsync``
    loaded         milliseconds of ``load()`` into new memory, and into the same tensors; every hash checked
    private bytes  growth of the process's private memory by the Checkpointer and its saves (``RssAnon``: slabs are shared
                   memory, and not in it), for each tensor
    objects        growth of the number of objects that the garbage collector looks at, for each tensor

``--profile`` prints instead where the trainer's thread spends a later save.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from stager import Checkpointer
from tests.benchmarks.launch import ROOT

_LATER_SAVES = 8


def _private_bytes() -> int:
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def _ms(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)


def _train(tensors: list[torch.Tensor], secs: float) -> None:
    """Use the tensors as a training loop does. On some hosts, memory that was idle for a second is slow at its next use."""
    until = time.monotonic() + secs
    while time.monotonic() < until:
        torch._foreach_add_(tensors, 0.0)


def measure(count: int, nbytes: int, wait_secs: float, *, profile: bool = False) -> dict[str, Any]:
    """Measure one number of tensors in this process.

    Args:
        nbytes: of each tensor.
        wait_secs: between the constructor and the first save; the tensors are used meanwhile.
    """
    state = {"model": {f"layers.{number}.weight": torch.randn(nbytes // 4) for number in range(count)}}
    torch.save({"x": torch.ones(2)}, io.BytesIO())  # what torch makes at its first use
    with tempfile.TemporaryDirectory(prefix="stager-bench-") as directory:
        before, objects = _private_bytes(), len(gc.get_objects())
        with Checkpointer(directory) as ckpt:
            _train(list(state["model"].values()), wait_secs)
            blocked, stored = [], 0.0
            for step in range(1 + _LATER_SAVES):
                profiler = cProfile.Profile() if profile and step == _LATER_SAVES else None
                if profiler is not None:
                    profiler.enable()
                started = time.perf_counter()
                handle = ckpt.save(step, state)
                blocked.append(_ms(started))
                if profiler is not None:
                    profiler.disable()
                    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)
                handle.upload_completion.result()
                stored = _ms(started)
            del handle
            grown, more = _private_bytes() - before, len(gc.get_objects()) - objects
            started = time.perf_counter()
            assert ckpt.load() is not None
            fresh = _ms(started)
            started = time.perf_counter()
            assert ckpt.load(into=state) is not None
            in_place = _ms(started)
    return {
        "tensors": count,
        "first_ms": blocked[0],
        "later_ms": statistics.median(blocked[1:]),
        "most_later_ms": max(blocked[1:]),
        "stored_ms": stored,
        "loaded_ms": fresh,
        "loaded_in_place_ms": in_place,
        "private_bytes_per_tensor": grown / count,
        "objects_per_tensor": more / count,
    }


def _in_a_process(count: int, nbytes: int, wait_secs: float) -> dict[str, Any]:
    arguments = ("--child", "--count", str(count), "--nbytes", str(nbytes), "--wait", str(wait_secs))
    command = [sys.executable, "-m", "tests.benchmarks.many_tensors", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure each number of tensors, and print a table."""
    parser = argparse.ArgumentParser(description="What each of many small tensors costs.")
    parser.add_argument("--count", type=int, action="append", help="number of tensors; may be repeated")
    parser.add_argument("--nbytes", type=int, default=256, help="of each tensor")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds of training before the first save")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each number; the figures are medians")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--profile", action="store_true", help="print where the trainer's thread spends a later save")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = options.count or [20_000, 200_000, 1_000_000]
    if options.child or options.profile:
        print(json.dumps(measure(counts[0], options.nbytes, options.wait, profile=options.profile)))
        return
    results = []
    for count in counts:
        rounds = [_in_a_process(count, options.nbytes, options.wait) for _ in range(options.rounds)]
        results.append({name: statistics.median(one[name] for one in rounds) for name in rounds[0]})
        print("  ".join(f"{name} {value:,.1f}" for name, value in results[-1].items()), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
