"""One child process: start it, watch it, end it and everything it started."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.footprint import PeakWatch
from tests.benchmarks.job import MARK, Job
from tests.benchmarks.records import Failure, Finished, Outcome, Ready, Record, from_json

ROOT = Path(__file__).parents[2]
_POLL_SECS = 0.5
_EXIT_SECS = 30.0  # for a child to end once its peer is closed, and for what it started to end after it


@dataclass(frozen=True, slots=True)
class Launched:
    """What a child left.

    Attributes:
        records: all that it reported.
        failure: why it did not finish; None: it did.
        notes: what else was odd: it did not exit, it left processes behind.
    """

    records: tuple[Record, ...]
    failure: Failure | None
    notes: tuple[str, ...]


def launch(job: Job, deadline_secs: float) -> Launched:
    """Run one job. Returns when no process of it is left."""
    mark = secrets.token_hex(8)
    records_path, log_path = Path(job.records), Path(job.records + ".log")
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.child", job.to_text()],
            cwd=ROOT,
            env={**os.environ, MARK: mark, "PYTHONPATH": _python_path()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        watch = PeakWatch(process.pid, records_path) if job.measure == "memory" else None
        try:
            in_time = _wait(process, records_path, deadline_secs)
        finally:
            if watch is not None:
                watch.stop()
            left = end_all(mark, process)
    return _conclude(process, records_path, log_path, watch, in_time, left, deadline_secs)


def _python_path() -> str:
    """The checkout first, so that a child measures it whatever is installed."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _wait(process: subprocess.Popen[bytes], records: Path, deadline_secs: float) -> bool:
    """Whether it ended by itself in time. Once it has reported its end or its failure it gets a moment more, no longer."""
    end = time.monotonic() + deadline_secs
    said_all = False
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECS)
            return True
        if not said_all and any(isinstance(r, Failure | Finished) for r in read_records(records)):
            said_all, end = True, min(end, time.monotonic() + _EXIT_SECS)
    return False


def end_all(mark: str, process: subprocess.Popen[bytes]) -> int:
    """Kill the child and all it started; how many of those had outlived it by more than a moment."""
    outlived = 0
    if process.poll() is not None:
        outlived = len(psutil.wait_procs(marked(mark), timeout=_EXIT_SECS)[1])
    process.kill()
    process.wait()
    while found := marked(mark):  # again: one may have been starting another
        for each in found:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(found, timeout=_EXIT_SECS)
    return outlived


def marked(mark: str) -> list[psutil.Process]:
    """Every process that carries the mark in its environment, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _conclude(
    process: subprocess.Popen[bytes],
    records_path: Path,
    log_path: Path,
    watch: PeakWatch | None,
    in_time: bool,
    left: int,
    deadline_secs: float,
) -> Launched:
    records = read_records(records_path)
    failure = next((r for r in records if isinstance(r, Failure)), None)
    finished = any(isinstance(r, Finished) for r in records)
    notes = [f"left {left} processes behind, which were killed"] if left else []
    if not in_time and (finished or failure is not None):
        notes.append("did not exit by itself and was killed")
    elif not in_time:
        failure = Failure(Outcome.DEADLINE.value, f"not done after {deadline_secs:g} s, killed")
    elif failure is None and not finished:
        failure = Failure(Outcome.FAILED.value, f"ended with {_ending(process.returncode)}: {_tail(log_path)}")
    ready = next((r for r in records if isinstance(r, Ready)), None)
    if watch is not None and ready is not None:
        records.append(watch.memory(ready.pss_bytes))
    return Launched(tuple(records), failure, tuple(notes))


def read_records(path: Path) -> list[Record]:
    """What is whole; a line may be cut short by a kill."""
    records = []
    with suppress(FileNotFoundError):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                records.append(from_json(json.loads(line)))
    return records


def _ending(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"exit code {returncode}"


def _tail(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
