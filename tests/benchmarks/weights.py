"""``python -m tests.benchmarks.weights``: exporting weights in the layout of transformers, beside DCP's own writer of it.

All begin with the same checkpoint, which stager saved in the format ``dcp`` and which is in the page cache, and end with
safetensors files of 1 GiB and an index. Each leg is a process of its own; what is measured begins after its imports.

    raw                the checkpoint's data files are copied: 256 KiB at a time, one thread, and synced
    stager             ``export_weights()``: each hash checked, files synced
    stager, bfloat16   the same, with ``dtype="bfloat16"``
    dcp                ``dcp.load()``, which checks nothing, and ``dcp.save()`` with ``HuggingFaceStorageWriter`` and two
                       threads, which writes files of a rank, consolidates them into whole ones, and does not sync these

Memory is measured in a round of its own: the peak of the process and all below it, shared pages counted once (PSS), and how
much more that is than before. Times are medians over the other rounds, ratios medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer, export_weights
from tests.benchmarks.footprint import pss_bytes, tree_pss_bytes
from tests.benchmarks.launch import ROOT
from tests.benchmarks.machine import describe_machine, describe_versions

_INTERVAL_SECS = 0.02
_COLUMNS = 2048
_FILES = 4


def _shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """A model of float32: an embedding of an eighth of it, and matrices of 32 MiB, or less if it is small."""
    rows = max(_FILES * 8, nbytes // (4 * _COLUMNS))
    each = max(1, min(4096, rows // 16))
    shapes = {"embedding.weight": (rows // 8, _COLUMNS)}
    return shapes | {f"layers.{number}.weight": (each, _COLUMNS) for number in range((rows - rows // 8) // each)}


def _save(directory: Path, nbytes: int) -> int:
    """Save the state. Returns its bytes."""
    state = {name: torch.randn(shape) for name, shape in _shapes(nbytes).items()}
    with Checkpointer(directory / "run") as ckpt:
        ckpt.save(1, {"model": state}).upload_completion.result()
    return sum(tensor.nbytes for tensor in state.values())


def _raw(directory: Path, nbytes: int) -> None:
    (directory / "out").mkdir()
    buffer = memoryview(bytearray(256 << 10))
    for source in (directory / "run").glob("step-*/*.distcp"):
        with open(source, "rb", buffering=0) as read, open(directory / "out" / source.name, "wb", buffering=0) as write:
            while count := read.readinto(buffer):
                write.write(buffer[:count])
            os.fsync(write.fileno())


def _stager(directory: Path, nbytes: int, **options: Any) -> None:
    weights = {"keys": "model", "strip_prefix": "model.", "max_shard_bytes": -(-nbytes // _FILES)}
    export_weights(directory / "run", directory / "out", **weights, **options)


def _stager_bfloat16(directory: Path, nbytes: int) -> None:
    _stager(directory, nbytes, dtype="bfloat16")


def _dcp(directory: Path, nbytes: int) -> None:
    shapes = _shapes(nbytes)
    state = {"model": {name: torch.empty(shape) for name, shape in shapes.items()}}
    (checkpoint,) = (directory / "run").glob("step-*")
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    files = {name: 1 + number * _FILES // len(shapes) for number, name in enumerate(shapes)}
    writer = dcp.HuggingFaceStorageWriter(
        str(directory / "out"),
        fqn_to_index_mapping=files,
        thread_count=2,
        save_distributed=True,
        enable_consolidation=True,
        thread_count_consolidation=2,
    )
    dcp.save(state["model"], storage_writer=writer, no_dist=True)


LEGS: dict[str, Callable[[Path, int], None]] = {
    "raw": _raw,
    "stager": _stager,
    "stager, bfloat16": _stager_bfloat16,
    "dcp": _dcp,
}


def _be_leg(name: str, directory: Path, nbytes: int) -> None:
    """In the process of a leg."""
    base = pss_bytes(os.getpid())
    started = time.perf_counter()
    LEGS[name](directory, nbytes)
    secs = time.perf_counter() - started
    print(json.dumps({"secs": secs, "base_bytes": base}))


def _run_leg(name: str, directory: Path, nbytes: int, *, watch_memory: bool) -> dict[str, float]:
    shutil.rmtree(directory / "out", ignore_errors=True)
    os.sync()  # what another leg has left to write
    options = ["--leg", name, "--in", str(directory), "--size", str(nbytes)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.weights", *options]
    peak = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while watch_memory and process.poll() is None:
            peak = max(peak, tree_pss_bytes(process.pid))
            time.sleep(_INTERVAL_SECS)
        assert process.stdout is not None
        said = process.stdout.read()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"the leg {name} ended with exit code {process.returncode}")
    result = json.loads(said.splitlines()[-1])
    written = sum(path.stat().st_size for path in (directory / "out").iterdir() if path.is_file())
    assert written >= nbytes * (0.5 if "bfloat16" in name else 1), f"{name} wrote {written} bytes"
    return {"secs": result["secs"], "peak_bytes": peak, "grown_bytes": max(0, peak - result["base_bytes"])}


def measure(nbytes: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Measure all legs in turn."""
    nbytes = _save(directory, nbytes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LEGS}
    names = list(LEGS)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(_run_leg(name, directory, nbytes, watch_memory=False))
    memory = {name: _run_leg(name, directory, nbytes, watch_memory=True) for name in LEGS}
    return {
        "nbytes": nbytes,
        "machine": asdict(describe_machine(directory, min(1.0, nbytes / (4 << 30)))),
        "versions": asdict(describe_versions()),
        "legs": {
            name: {
                "secs": statistics.median(one["secs"] for one in rows),
                "range_secs": [min(one["secs"] for one in rows), max(one["secs"] for one in rows)],
                "peak_bytes": memory[name]["peak_bytes"],
                "grown_bytes": memory[name]["grown_bytes"],
                "secs / raw": statistics.median(
                    one["secs"] / raw["secs"] for one, raw in zip(rows, found["raw"], strict=True)
                ),
            }
            for name, rows in found.items()
        },
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=4096, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="measure in this directory; default: the temporary one")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    for hidden in ("--leg", "--in", "--size"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.leg is not None:
        _be_leg(options.leg, Path(getattr(options, "in")), int(options.size))
        return {}
    with tempfile.TemporaryDirectory(prefix="stager-weights-", dir=options.directory) as directory:
        result = measure(options.mib << 20, options.rounds, Path(directory))
    for name, one in result["legs"].items():
        low, high = one["range_secs"]
        print(
            f"{name:18} {one['secs']:7.2f} s ({low:.2f} to {high:.2f}), {one['secs / raw']:.2f} of raw, peak memory "
            f"{one['peak_bytes'] / 2**20:,.0f} MiB, +{one['grown_bytes'] / 2**20:,.0f}"
        )
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
