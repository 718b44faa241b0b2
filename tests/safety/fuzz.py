"""Opens hostile checkpoints: sealed documents that lie, archives, pickles, and files that are not checkpoints at all.

    python -m tests.safety.fuzz --count 100000 --seed 1

Each try is a fresh copy of a small run's directory, spoiled by a random source of its own (seed and number), opened in a
few ways. What is looked for: an error that is not one of ours, a crash, a hang, a mark left by a pickle that ran, a
change outside the run's directory, a class of the process that was changed, memory. The tries are made in child
processes with a limit on memory, so that the worst ends a child and is known by its number.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from stager.workers.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
    StorageError,
    UnloadableError,
    UnsafePickleError,
    UnstageableError,
    UsageError,
)
from tests.safety.opening import OPENINGS, draw_openings, openings_of
from tests.safety.targets import Target, make_targets

_ALLOWED = (
    *(CorruptCheckpointError, CheckpointNotFoundError, StorageError),
    *(UnsafePickleError, UnloadableError, StateMismatchError),
)
_MEMORY_BYTES = 1 << 30  # beside what the process has anyway
_HANG_SECS = 20
_POISONED = (MetadataIndex, pathlib.PosixPath, OrderedDict)


# What does not fit the target, in the words of torch's planners; and what we say of a call that is not the right one.
_MEANT = {
    ValueError: ("Size mismatch between saved",),
    RuntimeError: ("Missing key in checkpoint state_dict",),
    UsageError: (
        "is one checkpoint",
        "cannot be loaded on this host",
        "not a mapping",
        "storage extension",
        "which stager cannot read",
        "torch.save did not write",  # and the other kinds of files that are told by how they begin
        "is JSON",
        "is compressed by",
    ),
    UnstageableError: ("",),  # a state that the format of an export cannot hold
}


def _is_meant(error: Exception) -> bool:
    return any(words in str(error) for words in _MEANT.get(type(error), ()))


@dataclass
class Findings:
    """Attributes:
    outcomes: by what was spoiled and the error that came of it.
    problems: what should not have happened, each once: its kind, and the first case that showed it.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: OrderedDict[str, str] = field(default_factory=OrderedDict)
    tries: int = 0
    calls: int = 0

    def problem(self, kind: str, case: str) -> None:
        self.problems.setdefault(kind, case)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is said about each of a hundred thousand bad checkpoints nobody reads."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("stager", "torch")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)


class Fuzzer:
    """
    Args:
        directory: to work in; a fast file system.
    """

    def __init__(self, directory: Path) -> None:
        with quiet():
            self._targets = make_targets(directory / "bases")
        self._work = directory / "work"
        self._mark = directory / "mark"

    def attempt(self, seed: int, number: int, findings: Findings) -> None:
        """One try."""
        rng = random.Random(f"{seed}/{number}")
        name = rng.choice(list(self._targets))
        case = f"seed {seed} number {number}, {name}"
        run_dir = self._fresh(self._targets[name])
        self._targets[name].spoil(rng, run_dir, self._mark)
        for opening in draw_openings(rng, name):
            with quiet():
                self._open(name, opening, run_dir, findings, case)
        self._look_around(findings, case)
        findings.tries += 1

    def open_unspoiled(self) -> Findings:
        """Nothing is wrong with what is spoiled afterwards."""
        findings = Findings()
        for name, target in self._targets.items():
            for opening in openings_of(name):
                with quiet():
                    self._open(name, opening, self._fresh(target), findings, name)
        return findings

    def _fresh(self, target: Target) -> Path:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(target.base, self._work)
        return self._work / "run"

    def _open(self, name: str, opening: str, run_dir: Path, findings: Findings, case: str) -> None:
        findings.calls += 1
        try:
            OPENINGS[opening](run_dir)
            outcome = "accepted"
        except _ALLOWED as error:
            outcome = type(error).__name__
        except Exception as error:  # noqa: BLE001  # this is what is looked for
            outcome = type(error).__name__
            if not _is_meant(error):
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{outcome} from {opening} at {Path(place.filename).name}:{place.lineno}: {str(error)[:120]}"
                findings.problem(kind, case)
        findings.outcomes[f"{name}: {outcome}"] += 1

    def _look_around(self, findings: Findings, case: str) -> None:
        if self._mark.exists():
            findings.problem("code of the checkpoint ran", case)
            self._mark.rmdir()
        for poisoned in _POISONED:
            if hasattr(poisoned, "poisoned"):
                findings.problem(f"{poisoned.__name__} was changed for the whole process", case)
        with contextlib.suppress(OSError):
            shutil.rmtree("mkdir")
        if sorted(os.listdir(self._work)) != ["canary", "run"] or (self._work / "canary").read_text() != "precious":
            findings.problem("something outside the run's directory was changed", case)


def _child(first: int, count: int, seed: int, progress: Path) -> int:
    """Tries ``first`` to ``first + count``; the number of the one that is going on stands in ``progress``."""
    torch.set_num_threads(1)
    findings = Findings()
    with tempfile.TemporaryDirectory() as directory:
        fuzzer = Fuzzer(Path(directory))
        fuzzer.attempt(seed, first, Findings())  # what libraries take once
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, used + _MEMORY_BYTES))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fd = os.open(progress, os.O_WRONLY | os.O_CREAT, 0o600)
        most, peak = (0, first), before
        for number in range(first, first + count):
            os.pwrite(fd, f"{number:12d}".encode(), 0)
            faulthandler.dump_traceback_later(_HANG_SECS, exit=True)
            fuzzer.attempt(seed, number, findings)
            last, peak = peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            most = max(most, (peak - last, number))
        faulthandler.cancel_dump_traceback_later()
    print(f"RESULT {findings.tries} {findings.calls} {peak - before}")
    print(f"MEMORY {most[0]} {most[1]}")
    for outcome, times in findings.outcomes.items():
        print(f"OUTCOME {times} {outcome}")
    for kind, case in findings.problems.items():
        print(f"PROBLEM {kind!r} ({case})")
    return 0


def _parent(count: int, seed: int, start: int, num_processes: int, block: int) -> int:
    """Children of ``block`` tries each; one that dies is a finding, and the next goes on behind the try that killed it."""
    totals, outcomes, problems = Counter[str](), Counter[str](), OrderedDict[str, None]()
    most_grown, most_at_once = 0, (0, 0)
    started = time.monotonic()
    todo = [(first, min(block, start + count - first)) for first in range(start, start + count, block)][::-1]
    with tempfile.TemporaryDirectory() as directory:
        running: list[tuple[int, int, Path, subprocess.Popen[str]]] = []
        while todo or running:
            while todo and len(running) < num_processes:
                first, length = todo.pop()
                progress = Path(directory) / f"{first}"
                command = [sys.executable, "-m", "tests.safety.fuzz", "--child", str(progress), "--seed", str(seed)]
                command += ["--start", str(first), "--count", str(length)]
                with open(f"{progress}.out", "w") as output, open(f"{progress}.err", "w") as errors:
                    process = subprocess.Popen(command, stdout=output, stderr=errors, text=True)
                running.append((first, length, progress, process))
            first, length, progress, process = running.pop(0)
            code = process.wait()
            for line in Path(f"{progress}.out").read_text().splitlines():
                kind, _, rest = line.partition(" ")
                if kind == "RESULT":
                    tries, calls, grown = map(int, rest.split())
                    totals.update(tries=tries, calls=calls)
                    most_grown = max(most_grown, grown)
                elif kind == "MEMORY":
                    grown, at = map(int, rest.split())
                    most_at_once = max(most_at_once, (grown, at))
                elif kind == "OUTCOME":
                    times, _, outcome = rest.partition(" ")
                    outcomes[outcome] += int(times)
                elif kind == "PROBLEM":
                    problems.setdefault(rest)
            if code != 0:
                at = int(progress.read_text()) if progress.exists() else first
                log = Path(f"{progress}.err").read_text()[-3000:]
                problems.setdefault(f"child ended with {code} at seed {seed} number {at}\n{log}")
                totals.update(tries=at - first)
                if at + 1 < first + length:
                    todo.append((at + 1, first + length - at - 1))
    secs = time.monotonic() - started
    print(f"{totals['tries']:,} tries, {totals['calls']:,} calls, {len(problems)} findings, {secs:.0f} s, seed {seed};")
    print(f"resident memory grew by at most {most_grown / 1024:.0f} MiB in a process of {block} tries,")
    print(f"and by {most_at_once[0] / 1024:.0f} MiB in one try (number {most_at_once[1]})")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {outcome}: {times:,}")
    for problem in problems:
        print("FINDING", problem)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first try")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--block", type=int, default=2500, help="tries per process")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return _child(options.start, options.count, options.seed, options.child)
    return _parent(options.count, options.seed, options.start, options.processes, options.block)


if __name__ == "__main__":
    sys.exit(main())
