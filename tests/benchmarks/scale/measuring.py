"""Measures the real code: a commit at several sizes, each step in a process of its own, and the store's server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.scale.measured import Commit, Measured, Parse, Stock
from tests.benchmarks.scale.size import Size

ROOT = Path(__file__).parents[3]
_STOCK_NAMES = 1_200_000  # a plan of stock DCP takes about 3 KiB of memory for each
_THREADS = 4
_SERVER = (
    "import sys, torch.distributed as dist; "
    "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
    "print(store.port, flush=True); sys.stdin.read()"
)

Progress = Callable[[str], None]


def measure(sizes: Sequence[Size], directory: Path, progress: Progress) -> list[Measured]:
    """
    Args:
        directory: for the files of ranks that there are not.
    """
    return [_measure(size, directory, progress) for size in sizes]


def _measure(size: Size, directory: Path, progress: Progress) -> Measured:
    with tempfile.TemporaryDirectory(prefix="stager-scale-", dir=directory) as name:
        progress(f"measuring a commit of {size.ranks:,} ranks, {size.rows:,} rows")
        commit = Commit(**_child("commit", name, size))
        parse = Parse(**_child("parse", name, size))
        stock = Stock(**_child("stock", name, size)) if size.names <= _STOCK_NAMES else None
    return Measured(size, commit, parse, stock)


def _child(what: str, directory: str, size: Size) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.scale.child", what, directory, json.dumps(asdict(size))]
    printed = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(printed.splitlines()[-1]))


def store_service_secs(num_requests: int) -> float:
    """CPU time of the server of torch's ``TCPStore`` for one ``check``, with several clients asking at once."""
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdin is not None and server.stdout is not None
        port, process = int(server.stdout.readline()), psutil.Process(server.pid)
        before = process.cpu_times()
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda _: _ask(port, num_requests // _THREADS), range(_THREADS)))
        after = process.cpu_times()
    finally:
        server.communicate()
    return max(0.0, after.user + after.system - before.user - before.system) / num_requests


def _ask(port: int, num_requests: int) -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]  # as its users call it
    for _ in range(num_requests):
        store.check(["saves/0123456789abcdef"])
