"""``python -m tests.benchmarks.loading``: loading beside ``dcp.load`` and a raw read of the same files.

All files are in the page cache: they are read once before each measurement. With ``--cold`` none is: they are dropped from
it before each measurement. Each round times, in turn:

    stager       ``Checkpointer.load(into=)`` of stager's checkpoint, into tensors that are there, every hash checked
    dcp.load     of a checkpoint of ``dcp.save`` of the same state, into the same tensors; nothing is checked
    raw read     ``preadv`` of stager's files into warm memory, as many threads as stager uses, and one
    direct read  the same past the page cache (``O_DIRECT``), with so many threads; only with ``--cold``

The figures are medians over the rounds; the ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer
from stager.config.host import usable_cores

_PIECE_BYTES = 8 << 20
_DEPTHS = (1, 2, 4, 8)  # direct reads at a time


def _big(scale: float) -> dict[str, torch.Tensor]:
    rows = max(1, int(5592405 * scale))
    return {f"w{i}": torch.rand(rows) for i in range(72)}


def _small(scale: float) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.rand(256) for i in range(max(1, int(20_000 * scale)))}


CASES = {"big": _big, "small": _small}


def _raw_read(files: list[Path], memory: memoryview, num_threads: int, flags: int = 0) -> None:
    pieces, at = [], 0
    for path in files:
        size = path.stat().st_size
        for start in range(0, size, _PIECE_BYTES):
            nbytes = _in_pages(min(_PIECE_BYTES, size - start))
            pieces.append((path, start, memory[at : at + nbytes]))
            at += nbytes
    descriptors = {path: os.open(path, os.O_RDONLY | flags) for path in files}
    try:
        with ThreadPoolExecutor(num_threads) as executor:
            read = [executor.submit(os.preadv, descriptors[path], [target], start) for path, start, target in pieces]
            assert sum(future.result() for future in read) == sum(path.stat().st_size for path in files)
    finally:
        for fd in descriptors.values():
            os.close(fd)


def _in_pages(nbytes: int) -> int:
    """Round up to whole pages, which ``O_DIRECT`` reads."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _touch(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(_PIECE_BYTES):
                    pass


def _drop(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)  # what is not on the disk yet stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(case: str, scale: float, rounds: int, directory: Path, *, cold: bool = False) -> dict[str, Any]:
    state = CASES[case](scale)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    with Checkpointer(directory / "run") as ckpt:
        info = ckpt.save(1, {"model": state}).upload_completion.result()
    dcp.save({"model": state}, checkpoint_id=str(directory / "stock"), no_dist=True)
    files = sorted(Path(info.path).glob("*.distcp"))
    nbytes = sum(_in_pages(path.stat().st_size) for path in files)
    memory = memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    reader = Checkpointer(directory / "run", read_only=True)
    threads = min(8, usable_cores())
    actions: dict[str, Callable[[], object]] = {
        "stager": lambda: reader.load(1, into={"model": state}),
        "dcp.load": lambda: dcp.load({"model": state}, checkpoint_id=str(directory / "stock"), no_dist=True),
        "raw read": lambda: _raw_read(files, memory, threads),
        "raw read, one thread": lambda: _raw_read(files, memory, 1),
    }
    if cold:
        for depth in _DEPTHS:
            name = f"direct read, {depth} thread{'s' * (depth > 1)}"
            actions[name] = partial(_raw_read, files, memory, depth, os.O_DIRECT)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name in sorted(actions, key=lambda name: hash((name, number))):
            (_drop if cold else _touch)(directory)
            for tensor in state.values():
                tensor.zero_()
            secs = _timed(actions[name])
            if number:  # the first round warms up
                times[name].append(secs)
            if name in ("stager", "dcp.load"):
                assert all(torch.equal(state[key], expected[key]) for key in state), name
    best = min(times, key=lambda name: statistics.median(times[name]) if "read" in name else float("inf"))
    return {
        "case": case,
        "cold": cold,
        "nbytes": info.nbytes,
        "ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "range_ms": {name: [1e3 * min(values), 1e3 * max(values)] for name, values in times.items()},
        "dcp.load / stager": _ratio(times["dcp.load"], times["stager"]),
        "raw read / stager": _ratio(times["raw read"], times["stager"]),
        "raw read, one thread / stager": _ratio(times["raw read, one thread"], times["stager"]),
        "best": best,
        "best raw read / stager": _ratio(times[best], times["stager"]),
    }


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the page cache before each measurement"
    )
    parser.add_argument("--out", type=Path, help="write a JSON file")
    options = parser.parse_args(arguments)
    results = []
    for case in options.case or sorted(CASES):
        with tempfile.TemporaryDirectory(prefix="stager-loading-") as directory:
            results.append(measure(case, options.scale, options.rounds, Path(directory), cold=options.cold))
    for one in results:
        print(f"{one['case']}: {one['nbytes'] / 2**20:,.0f} MiB{', cold' if one['cold'] else ''}")
        for name, value in one["ms"].items():
            low, high = one["range_ms"][name]
            print(f"  {name:22} {value:8.0f} ms ({low:.0f} to {high:.0f})")
        for name in ("dcp.load / stager", "raw read / stager", "raw read, one thread / stager"):
            print(f"  {name:30} {one[name]:.2f}")
        print(f"  {'best raw read / stager':30} {one['best raw read / stager']:.2f} ({one['best']})")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
