"""The simulation counts what the code does: both run on few ranks, with the same clock. And the program runs."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stager.ranks import commit_watch
from stager.ranks import rendezvous as rendezvous_module
from stager.ranks.agreement import Agreement
from stager.ranks.messages import LeafEntry
from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.snapshot.batches import batch
from stager.snapshot.copying import Copier
from stager.snapshot.pieces import whole
from stager.snapshot.slab_writer import SlabWriter
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner
from stager.workers.checkpoint.commit import persist
from stager.workers.checkpoint.documents.receipt import receipt_name
from stager.workers.checkpoint.formats import contract, get_format
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.memory.slab import Slab
from tests import forked_subprocess
from tests.benchmarks.scale import measuring
from tests.benchmarks.scale.__main__ import main
from tests.benchmarks.scale.agreement import SAVE_ID, Kind, settle
from tests.benchmarks.scale.costs import Costs
from tests.benchmarks.scale.ending import COMMITTED, Ending
from tests.benchmarks.scale.fit import fit
from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.run import kinds_of
from tests.benchmarks.scale.saving import Save
from tests.benchmarks.scale.simulation import Actor, Steps
from tests.benchmarks.scale.size import Size
from tests.benchmarks.scale.store import SimulatedGroup
from tests.benchmarks.scale.turns import NothingPendingError, TurnCondition, TurnDirectory, Turns, TurnStore
from tests.benchmarks.scale.world import World

PARAMETERS = Parameters(store_service_secs=3e-4)  # slow, so that ranks wait for each other's requests
COSTS = Costs(0.0, 0.0, 0.0, 5e6, 0.0, 0.3)


def starts_of(num_ranks: int) -> list[float]:
    chance = random.Random(num_ranks)
    return [chance.uniform(0.0, PARAMETERS.skew_secs) for _ in range(num_ranks)]


def world(num_ranks: int, parameters: Parameters = PARAMETERS) -> World:
    return World(parameters, num_ranks, COSTS)


# -- the agreement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "num_kinds", "num_shards"),
    [(2, 1, 2), (3, 1, 1), (4, 2, 2), (5, 5, 5), (8, 1, 4), (8, 3, 8), (12, 12, 4)],
)
def test_agreement_sends_what_the_code_sends_and_takes_as_long(
    num_ranks: int, num_kinds: int, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = kinds_of(Parameters(kinds=num_kinds))
    kind_of = [kinds[rank * num_kinds // num_ranks] for rank in range(num_ranks)]
    starts = starts_of(num_ranks)

    turns, ended = Turns(), [0.0] * num_ranks
    store = TurnStore(turns, PARAMETERS)
    monkeypatch.setattr(rendezvous_module, "time", turns)

    def real(rank: int) -> None:
        shard = LeafEntry("w", "float32", (num_shards,), (rank % num_shards,), (1,))
        with closing(RankGroup(rank, num_ranks, Rendezvous(store, "stager/0", num_ranks))) as group:
            kind = kind_of[rank]
            Agreement(group).settle(SAVE_ID, kind.plain.entries, [[shard]], lambda: kind.values)
        ended[rank] = turns.now

    turns.run(starts, real)

    simulated = world(num_ranks)
    actors = [Actor(start) for start in starts]
    for rank, actor in enumerate(actors):
        simulated.simulation.start(_settle(simulated, actor, rank, kinds, kind_of[rank], num_shards), actor.now)
    simulated.simulation.run()
    assert (simulated.store.num_requests, simulated.store.nbytes) == (store.num_requests, store.nbytes)
    assert [actor.now for actor in actors] == ended


def _settle(world: World, actor: Actor, rank: int, kinds: list[Kind], kind: Kind, num_shards: int) -> Steps[None]:
    group = SimulatedGroup(world.store, actor, world.wait_poll_secs)
    return settle(group, rank, world.num_ranks, kinds, kind, [f"{rank % num_shards:032x}"])


# -- how a save ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "committer"), [(2, 0), (2, 1), (3, 2), (8, 0), (8, 5)])
@pytest.mark.parametrize("tells", [True, False], ids=["", "who committed dies"])
@pytest.mark.parametrize(("timeout_secs", "commits_at"), [(600.0, 7.77), (20.0, 37.77)], ids=["", "late"])
def test_ranks_ask_as_often_as_the_code_does_and_hear_of_the_commit_when_it_does(
    num_ranks: int, committer: int, tells: bool, timeout_secs: float, commits_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part is written, and one rank commits, in time or when the other ranks have waited once already."""
    parameters = replace(PARAMETERS, timeout_secs=timeout_secs)
    starts = starts_of(num_ranks)
    starts[committer] = commits_at

    turns, ended = Turns(), [0.0] * num_ranks
    store = TurnStore(turns, parameters)
    names = [receipt_name(rank, 0, 1) for rank in range(num_ranks)]
    directory = TurnDirectory(turns, parameters, COSTS, COMMITTED, names)
    for module in (rendezvous_module, commit_watch):
        monkeypatch.setattr(module, "time", turns)
    monkeypatch.setattr(commit_watch, "already_committed", directory.already_committed)
    monkeypatch.setattr(commit_watch, "partial_file_names", directory.file_names)

    def real(rank: int) -> None:
        with closing(RankGroup(rank, num_ranks, Rendezvous(store, "stager/0", num_ranks), timeout_secs)) as group:
            end_on(group)

    def end_on(group: RankGroup) -> None:
        pool: Any = _IdlePool()
        rank, watch = group.rank, commit_watch.CommitWatch(group, pool)
        watch._changed = TurnCondition(turns)
        watch._thread = threading.current_thread()  # this one watches

        def end(_: object) -> None:
            ended[rank] = turns.now

        if rank == committer:
            directory.committed = True
            if tells:
                watch.messages.post_committed(COMMITTED)
            end(None)
        else:
            watch.expect(_spec(rank, num_ranks), end, lambda error: pytest.fail(str(error)))
            with suppress(NothingPendingError):
                watch._watch()

    turns.run(starts, real)

    simulated = world(num_ranks, parameters)
    simulated.directory.num_receipts = num_ranks
    ending = Ending(simulated)

    def commit(actor: Actor) -> Steps[None]:
        simulated.directory.commit()
        ending.ended_at[committer] = actor.now
        if tells:
            yield from ending.tell(committer, actor)

    for rank, start in enumerate(starts):
        process = commit(Actor(start)) if rank == committer else ending.watch(rank, Actor(start))
        simulated.simulation.start(process, start)
    simulated.simulation.run()
    assert (simulated.store.num_requests, simulated.store.nbytes) == (store.num_requests, store.nbytes)
    assert simulated.files.calls.total() == directory.num_calls
    assert [ending.ended_at[rank] for rank in range(num_ranks)] == ended


class _IdlePool:
    """Whose workers see that somebody else commits."""

    def submit(self, *_: Any) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _spec(rank: int, num_ranks: int, directory: Path = Path("/nowhere"), num_parts: int = 1) -> SaveSpec:
    return SaveSpec(
        directory=str(directory),
        step=COMMITTED.info.step,
        save_id=COMMITTED.info.save_id,
        kind="dcp",
        num_parts=num_parts,
        fsync=True,
        created=time.time(),
        stager="0",
        torch="2",
        rank=rank,
        num_ranks=num_ranks,
    )


# -- a save ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "num_parts"), [(2, 1), (3, 2), (8, 1), (13, 2)])
def test_parts_and_commit_make_the_calls_of_the_code(
    num_ranks: int, num_parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part after the other, so that each gets the lock and lists the directory."""
    monkeypatch.setattr(contract, "SMALLEST_FILE_BYTES", 1)  # as many files as parts
    jobs = [_job(tmp_path, rank, num_ranks, num_parts) for rank in range(num_ranks)]
    with _counting() as counted:
        results = [persist.persist_part(job, part) for job in jobs for part in range(num_parts)]
    assert [result.committed is not None for result in results] == [False] * (len(results) - 1) + [True]

    parameters = Parameters(store_service_secs=1e-5, objects=1, parts=num_parts)
    simulated = world(num_ranks, parameters)
    apart = 2 * parameters.write_secs
    starts = [[apart * (rank * num_parts + part) for part in range(num_parts)] for rank in range(num_ranks)]
    Save(simulated, starts).ending = _Unwatched(simulated)
    simulated.simulation.run()
    found = {call.value: number for call, number in simulated.files.calls.items()}
    found |= {
        "read": simulated.files.num_reads,
        "sync": simulated.files.num_syncs,
        "listed": simulated.files.num_listed,
    }
    assert found == counted


class _Unwatched(Ending):
    """Nobody waits for the end."""

    def tell(self, rank: int, actor: Actor) -> Steps[None]:
        yield actor.now

    watch = tell


def _job(directory: Path, rank: int, num_ranks: int, num_parts: int) -> WriteTask:
    tensors = {str(number): torch.full((1000,), float(rank)) for number in range(num_parts)}
    file_format, flat = get_format("dcp"), flatten({"own": {f"rank-{rank}": {**tensors, "object": "text"}}})
    plan = Planner(file_format, num_parts, 64 << 20, rank).plan(flat)
    blobs = [file_format.object_blob(flat.leaves[leaf], leaf).blob for leaf in plan.objects]
    pieces = whole(plan, blobs, num_parts)
    slab = Slab.create(pieces.slab_nbytes)
    Copier(1).copy(batch(plan.copies), flat.leaves, slab)
    spec = _spec(rank, num_ranks, directory, num_parts)
    return SlabWriter().write(spec, pieces, pieces.pieces[0], slab, frozenset({slab.slab_id}))


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    """System calls by the names that the simulation has for them."""
    counted: Counter[str] = Counter()
    counting = threading.Lock()  # the commit has threads

    def count(**numbers: int) -> None:
        with counting:
            counted.update(numbers)

    def opened(original: Callable[..., int], path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        creates = bool(flags & os.O_CREAT)
        count(create=creates, open=not creates)
        fd = original(path, flags, *args, **kwargs)
        count(read=not creates and not flags & os.O_DIRECTORY)
        return fd

    def listed(original: Callable[..., list[str]], path: Any) -> list[str]:
        names = original(path)
        count(list=1, listed=len(names))
        return names

    def scanned(original: Callable[..., Any], path: Any) -> Any:
        count(list=1, listed=len(list_directory(path)))
        return original(path)

    def called(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        count(**{name: 1})
        return original(*args, **kwargs)

    list_directory = os.listdir
    names = {"mkdir": "create", "stat": "attributes", "lstat": "attributes", "ftruncate": "attributes"}
    names |= {"rename": "rename", "unlink": "unlink", "fsync": "sync"}
    with pytest.MonkeyPatch.context() as patch:
        for function, name in names.items():
            patch.setattr(os, function, partial(called, name, getattr(os, function)))
        patch.setattr(fcntl, "flock", partial(called, "lock", fcntl.flock))
        patch.setattr(os, "open", partial(opened, os.open))
        patch.setattr(os, "listdir", partial(listed, os.listdir))
        patch.setattr(os, "scandir", partial(scanned, os.scandir))
        yield counted


# -- stock DCP, the fit, the program -----------------------------------------------------------------------------


def test_stock_save_calls_the_collectives_that_are_counted(tmp_path: Path) -> None:
    """In a process of its own: a process group leaves threads."""
    script = """
import sys, json, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed import distributed_c10d as c10d
called = []
def recording(name, nbytes):
    original = getattr(c10d, name)
    def call(*args, **kwargs):
        called.append([name, nbytes(*args)])
        return original(*args, **kwargs)
    setattr(c10d, name, call)
recording("all_gather", lambda outs, one: one.nbytes)
recording("gather", lambda one, *_: one.nbytes)
recording("scatter", lambda one, *_: one.nbytes)
recording("broadcast", lambda one, *_: one.nbytes)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dcp.async_save({"a": torch.zeros(3)}, checkpoint_id=sys.argv[1]).result()
dist.destroy_process_group()
print(json.dumps(called))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "saved")]
    called = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    gathered = ["all_gather", "gather"]
    assert [name for name, _ in called] == [*gathered, "broadcast", "scatter", "scatter", *gathered, *["broadcast"] * 2]
    lengths = [nbytes for _, nbytes in called]
    assert [lengths[at] for at in (0, 2, 4, 5, 7)] == [8] * 5
    assert lengths[3] > 8 and lengths[8] > lengths[6] > 8


def test_fit_finds_a_line_and_says_how_far_off_it_is() -> None:
    sizes = [Size(8, 10, 8, 1), Size(64, 10, 64, 1), Size(64, 10, 8, 1), Size(64, 30, 8, 2)]
    line = fit(sizes, [3.0 * size.ranks + 0.5 * size.rows for size in sizes])
    assert (line.per_rank, line.per_name, line.per_row) == pytest.approx((3.0, 0.0, 0.5))
    assert line.at(Size(16384, 10, 16384, 1)) == pytest.approx(3.0 * 16384 + 0.5 * 11 * 16384)
    assert line.worst < 1e-6 < fit(sizes, [5.0, 6.0, 7.0, 9.0]).worst


def test_program_prints_tables_and_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scale.json"
    arguments = ["--ranks", "2,5", "--measure", "4:2", "--tensors", "6", "--store-requests", "40"]
    arguments += ["--kinds", "2", "--parts", "2", "--directory", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(measuring, "subprocess", forked_subprocess)
    main(arguments)
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [row["ranks"] for row in document["rows"]] == [2, 5]
    assert [one["size"]["ranks"] for one in document["measured"]] == [4]
    for row in document["rows"]:
        assert row["save"]["failed_ranks"] == 0 < row["save"]["tail_secs"]
        assert row["agreement"]["requests"] > 0
    assert printed.count("\n| 2 | ") == printed.count("\n| 5 | ") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]
    main(["--ranks", "3", "--shards", "2", "--measured", str(out)])  # other parameters, without measuring again
    assert capsys.readouterr().out.count("\n| 3 | ") == 4
