"""Power failures: every prefix of a save's recorded system calls, with what was not synced there or lost, and recovered.

python -m tests.safety.crash_order --random 20 --seed 1     prints how many states were looked at, and violations
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager.config import LoadingConfig
from stager.loading.loader import Loader
from stager.loading.place import Run
from stager.torch_api.storage import StagerStorageWriter
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix import file_sink, files
from stager.workers.checkpoint.storage.writing import Writing
from stager.workers.checkpoint.write.write_task import WriteTask
from tests.incremental.states import frozen_and_adapter, save_incrementally
from tests.persistence.tasks import Crash, load, make_task, run, save
from tests.safety.disk import digest, disk_after, outcomes, write_out
from tests.safety.recording import Recorder, Turns
from tests.states import same

OLD, NEW = {"x": torch.zeros(20)}, {"x": torch.ones(20), "y": {"z": torch.arange(9)}, "o": 2}
BLOCKS = {"x": torch.ones(4000), "y": {"z": torch.arange(1500)}, "o": 2}  # a few blocks of 4 KiB in each file
LINKED = {1: frozen_and_adapter(1.0), 2: frozen_and_adapter(2.0)}  # two of their files are the same
States = dict[int, Any]


@dataclass
class Replay:
    """Attributes:
    calls: that were recorded.
    prefixes, states: looked at; states that look the same are opened once (``distinct``).
    seen: "old" or "new", how often.
    violations: what is neither.
    """

    name: str
    calls: int = 0
    prefixes: int = 0
    states: int = 0
    distinct: int = 0
    seen: dict[str, int] = field(default_factory=lambda: {"old": 0, "new": 0})
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.calls} calls, {self.prefixes} prefixes, {self.states} states ({self.distinct} distinct): "
            f"{self.seen['old']} old, {self.seen['new']} new, {len(self.violations)} violations"
        )


def _in_threads(job: WriteTask, seed: int) -> Callable[[Recorder], None]:
    """Every part in a thread of its own."""

    def work(recorder: Recorder) -> None:
        count = job.spec.num_parts
        turns = Turns(seed, count)
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(lambda part: recorder.in_turn(turns, part, lambda: persist_part(job, part)), range(count)))

    return work


def _unpublished(run_dir: Path, **options: Any) -> None:
    """A save whose workers ended between the last receipt and the commit."""
    job = make_task(run_dir, NEW, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.commit.persist.try_commit", lambda *_: None)
        for part in range(job.spec.num_parts):
            persist_part(job, part)


def _unnamed(run_dir: Path, **options: Any) -> None:
    def crash(*_: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.storage.posix.file_system.rename_over", crash)
        with suppress(Crash):
            run(make_task(run_dir, NEW, **options))


@dataclass(frozen=True)
class Case:
    """Attributes:
    prepare: what is there before; synced.
    work: what is recorded.
    old, new: the checkpoints before and after, by step.
    exchange: the file system can exchange two names.
    """

    prepare: Callable[[Path], None]
    work: Make
    old: States
    new: States
    exchange: bool = True


Make = Callable[[Path, int], Callable[[Recorder], object]]


def _alone(step: int, **options: Any) -> Make:
    def make(run_dir: Path, seed: int) -> Callable[[Recorder], object]:
        job = make_task(run_dir, NEW, step=step, num_parts=1, **options)
        return lambda _: run(job)

    return make


def _several(step: int, count: int, **options: Any) -> Make:
    def make(run_dir: Path, seed: int) -> Callable[[Recorder], object]:
        return _in_threads(make_task(run_dir, NEW, step=step, num_parts=count, num_files=count, **options), seed)

    return make


def _base(run_dir: Path) -> None:
    save_incrementally(run_dir, 1.0, 1, None, num_parts=1)


def _incremental(step: int) -> Make:
    def make(run_dir: Path, seed: int) -> Callable[[Recorder], object]:
        return _in_threads(make_task(run_dir, LINKED[2], step=step, num_parts=2, incremental=True, base_step=1), seed)

    return make


def _past_the_page_cache(run_dir: Path, seed: int) -> Callable[[Recorder], object]:
    """``O_DIRECT`` where the file system takes it, from a thread beside the worker's; blocks, and what is less than one."""
    job = make_task(run_dir, BLOCKS, step=2, num_parts=1)

    def work(_: Recorder) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file_sink, "_DIRECT_FROM_BYTES", 1)
            run(replace(job, writing=Writing(direct_io=True)))

    return work


def _by_dcp_save(run_dir: Path, seed: int) -> Callable[[Recorder], object]:
    writer = StagerStorageWriter(run_dir / "step-00000002", num_threads=1)
    return lambda _: dcp.save(NEW, storage_writer=writer, no_dist=True)


def _recovering(run_dir: Path, seed: int) -> Callable[[Recorder], object]:
    return lambda _: recover(str(run_dir))


def _nothing(run_dir: Path) -> None:
    pass


def _old(run_dir: Path) -> None:
    save(run_dir, OLD, step=1, num_parts=1)


def _both(*steps: Callable[..., None]) -> Callable[[Path], None]:
    def prepare(run_dir: Path) -> None:
        for step in steps:
            step(run_dir)

    return prepare


CASES: dict[str, Case] = {
    "first save": Case(_nothing, _alone(1), {}, {1: NEW}),
    "second save": Case(_old, _alone(2), {1: OLD}, {1: OLD, 2: NEW}),
    "same step again": Case(_old, _alone(1), {1: OLD}, {1: NEW}),
    "same step again, two renames": Case(_old, _alone(1), {1: OLD}, {1: NEW}, exchange=False),
    "three workers": Case(_old, _several(2, 3), {1: OLD}, {1: OLD, 2: NEW}),
    "three workers, same step again": Case(_old, _several(1, 3), {1: OLD}, {1: NEW}),
    "torch format": Case(_old, _alone(2, kind="torch"), {1: OLD}, {1: OLD, 2: NEW}),
    "torch format, three workers": Case(_old, _several(2, 3, kind="torch"), {1: OLD}, {1: OLD, 2: NEW}),
    "safetensors format, three workers": Case(_old, _several(2, 3, kind="safetensors"), {1: OLD}, {1: OLD, 2: NEW}),
    "incremental": Case(_base, _incremental(2), {1: LINKED[1]}, {1: LINKED[1], 2: LINKED[2]}),
    "incremental, same step again": Case(_base, _incremental(1), {1: LINKED[1]}, {1: LINKED[2]}),
    "past the page cache": Case(_old, _past_the_page_cache, {1: OLD}, {1: OLD, 2: BLOCKS}),
    "dcp.save": Case(_old, _by_dcp_save, {1: OLD}, {1: OLD, 2: NEW}),
    "recovery from receipts": Case(_both(_old, _unpublished), _recovering, {1: OLD}, {1: NEW}),
    "recovery from a manifest": Case(_both(_old, _unnamed), _recovering, {1: NEW}, {1: NEW}),
}


def replay(name: str, directory: Path, seed: int, num_random: int) -> Replay:
    """Record one case in ``directory`` and look at every state that a power failure in it may leave."""
    case, result, rng = CASES[name], Replay(name), random.Random(seed)
    run_dir = directory / "run"
    run_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        if not case.exchange:
            patch.setattr(files, "exchange", lambda first, second: False)
        case.prepare(run_dir)
        work = case.work(run_dir, seed)
        recorder = Recorder(run_dir)
        with recorder.recording():
            work(recorder)
        result.calls = len(recorder.calls)
        _nothing_was_missed(recorder, run_dir)
        known: dict[bytes, str] = {}
        for length in range(len(recorder.calls) + 1):
            result.prefixes += 1
            for calls in outcomes(recorder.calls[:length], rng, num_random):
                result.states += 1
                inodes = disk_after(recorder, calls)
                look = digest(inodes, recorder.root)
                if look not in known:
                    write_out(inodes, recorder.root, directory / "disk")
                    known[look] = _judge(directory / "disk", case)
                    shutil.rmtree(directory / "disk")
                found = known[look]
                if length == len(recorder.calls) and found == "old":
                    found = "the save was over, and is lost"
                if found in result.seen:
                    result.seen[found] += 1
                else:
                    result.violations.append(f"{name}, after call {length} of {len(recorder.calls)}: {found}")
        result.distinct = len(known)
    return result


def _nothing_was_missed(recorder: Recorder, run_dir: Path) -> None:
    """However the bytes were written: what was recorded comes to what is there."""
    there = Recorder(run_dir)
    assert digest(disk_after(recorder, recorder.calls), recorder.root) == digest(there.before, there.root)


def _judge(run_dir: Path, case: Case) -> str:
    """ "old" or "new", or what is wrong."""
    for info in list_checkpoints(run_dir)[0]:  # a reader of this moment, before anybody recovers
        if not verify_checkpoint(info.path, num_threads=1).ok:
            return f"a damaged checkpoint under the name of a whole one: {info.path}"
    recover(str(run_dir))
    committed, skipped = list_checkpoints(run_dir)
    if skipped:
        return f"left: {skipped}"
    states = {}
    for info in committed:
        result = verify_checkpoint(info.path, num_threads=1)
        if not result.ok:
            return f"committed, and damaged: {result.problems}"
        states[info.step] = load(info)
    newest = Loader(Run(str(run_dir)), LoadingConfig(threads=1)).latest()
    if (newest.step if newest else None) != max(states, default=None):
        return f"latest() is {newest}"
    for name, expected in (("new", case.new), ("old", case.old)):
        if same(states, expected):
            return name
    return f"neither the old nor the new state: {sorted(states)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=20, help="random subsets of what was not synced, per prefix")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started, failed, prefixes, states = time.monotonic(), 0, 0, 0
    for name in CASES:
        with tempfile.TemporaryDirectory() as directory:
            result = replay(name, Path(directory), options.seed, options.random)
        print(result, flush=True)
        for line in result.violations[:5]:
            print("  ", line)
        failed, prefixes, states = failed + len(result.violations), prefixes + result.prefixes, states + result.states
    print(f"{prefixes:,} prefixes, {states:,} states, {failed} violations ({time.monotonic() - started:.0f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
