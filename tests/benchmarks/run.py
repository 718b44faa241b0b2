"""The order of a run: case by case, pass by pass, one child at a time.

The peers of a pass run in a shuffled order, so that drift of the machine falls on all of them alike. A peer that failed or
missed its deadline is not run again on that case. Every pass gives a peer one first save and a few later ones.
"""

from __future__ import annotations

import datetime
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from tests.benchmarks.cases import CASES, Case, Kind
from tests.benchmarks.job import Job
from tests.benchmarks.launch import ROOT, launch
from tests.benchmarks.machine import describe_machine, describe_versions
from tests.benchmarks.options import Options
from tests.benchmarks.peers import PEERS
from tests.benchmarks.results import CaseResults, Results, Row

_TOUCH = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096])"
_MOST_BYTES_PER_STATE_BYTE = 8  # state, limits, two slabs, written files, and room

Progress = Callable[[str], None]


def run(options: Options, progress: Progress, on_case: Callable[[Results, CaseResults], None]) -> Results:
    """Everything that ``options`` ask for. ``progress`` hears what is being done, ``on_case`` each finished case."""
    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir=options.directory) as name:
        directory = Path(name)
        results = Results(
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            machine=describe_machine(directory, options.scale),
            versions=describe_versions(),
            options={key: v for key, v in asdict(options).items() if not isinstance(v, Path)},
        )
        cases = [CASES[case] for case in options.cases or CASES]
        _touch_memory(cases, options, progress)
        for case in cases:
            results.cases[case.name] = _run_case(case, options, directory, progress)
            on_case(results, results.cases[case.name])
    return results


def _touch_memory(cases: list[Case], options: Options, progress: Progress) -> None:
    """Memory that a virtual machine never touched is many times slower the first time: touch it, and give it back."""
    wanted = int(max(case.nbytes for case in cases) * options.scale) * _MOST_BYTES_PER_STATE_BYTE
    nbytes = min(wanted, int(psutil.virtual_memory().available * 0.7))
    progress(f"touching {nbytes / (1 << 20):,.0f} MiB of memory once")
    subprocess.run([sys.executable, "-c", _TOUCH, str(nbytes)], check=False)


def _run_case(case: Case, options: Options, directory: Path, progress: Progress) -> CaseResults:
    results = CaseResults(case.name, case.what)
    peers = [peer for peer in case.peers if not options.peers or peer in options.peers]
    results.rows = {peer: Row(peer) for peer in peers}
    for job in _jobs(case, peers, options):
        row = results.rows[job.peer]
        if row.outcome != "ok":
            continue
        progress(f"{case.name}, pass {job.round + 1}, {PEERS[job.peer].title}, {job.measure}")
        _run_job(job, row, options, directory)
    return results


def _jobs(case: Case, peers: list[str], options: Options) -> list[Job]:
    jobs: list[Job] = []
    order = random.Random(f"{options.seed} {case.name}")
    rounds = options.rounds if case.kind is not Kind.SOAK else 1
    for index in range(rounds):
        shuffled = order.sample(peers, len(peers))
        jobs += [_job(case, peer, "times", index, options) for peer in shuffled]
        if index == 0 and options.memory and case.kind is Kind.SAVES:
            jobs += [_job(case, peer, "memory", index, options) for peer in shuffled]
    return jobs


def _job(case: Case, peer: str, measure: str, index: int, options: Options) -> Job:
    return Job(
        case=case.name,
        peer=peer,
        measure="memory" if measure == "memory" else "times",
        round=index,
        scale=options.scale,
        seed=options.seed,
        saves=options.saves,
        cap_secs=options.cap_secs,
        pairs=options.pairs,
        stretch_steps=options.stretch_steps,
        soak_saves=options.soak_saves,
        alone_secs=options.alone_secs,
        directory="",
        records="",
    )


def _run_job(job: Job, row: Row, options: Options, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as name:
        checkpoints = Path(name, "checkpoints")
        checkpoints.mkdir()
        job = replace(job, directory=str(checkpoints), records=str(Path(name, "records")))
        launched = launch(job, options.deadline_secs)
    row.records += launched.records
    row.note(launched.notes)
    if launched.failure is not None:
        message = launched.failure.message.replace(str(directory), "DIR").replace(str(ROOT), ".")
        row.fail(replace(launched.failure, message=message))
