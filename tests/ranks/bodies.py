"""What the ranks of the tests do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from stager import (
    Checkpointer,
    InconsistentRanksError,
    PathCheckpointer,
    PerRank,
    PruneFate,
    RankFailedError,
    StorageError,
    UsageError,
    WeightsExport,
    load_checkpoint,
)
from stager.ranks.partition import Partitioner
from stager.ranks.rendezvous import Rendezvous
from stager.state.flatten import flatten
from tests.faults import Faults, faults_of_this_process
from tests.ranks.layouts import Trained, build, differences, whole_state

CONFIG = {"workers": {"count": 1}, "ranks": {"timeout_secs": 20}}
FOR_EVER_SECS = 3600.0
"""A timeout that a test does not live to see: what waits for it is a hang, and fails the test as one."""


def state_of(trained: Trained, rank: int) -> dict[str, Any]:
    model, optimizer = trained
    own = {"rank": rank, "noise": torch.full((5,), float(rank))}
    return {"model": model, "optimizer": optimizer, "step": 7, "own": PerRank(own)}


def board_of(ckpt: Checkpointer) -> Rendezvous:
    """Where the ranks leave word for each other: tests ask it how far the others are."""
    return ckpt._group.rendezvous


def of_step(ckpt: Checkpointer, step: int) -> list[Any]:
    """The saves in flight of a step."""
    return [save for save in ckpt._run.saver.completion.in_flight() if save.step == step]


def save(rank: int, directory: str, layout: str) -> None:
    trained = build(layout, seed=3)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        info = ckpt.save(7, state_of(trained, rank)).upload_completion.result(60)
    assert info.step == 7
    expected = whole_state(trained)
    if rank == 0:
        torch.save(expected, Path(directory, "expected.pt"))


def save_and_load(rank: int, directory: str, layout: str) -> list[str]:
    save(rank, directory, layout)
    dist.barrier()
    return load(rank, directory, layout)


def load_resharded(rank: int, directory: str, layout: str) -> list[str]:
    """By stager and by stock ``dcp.load``."""
    return load(rank, directory, layout) + load_stock(rank, directory, layout)


def load(rank: int, directory: str, layout: str) -> list[str]:
    """Where what was loaded differs from what was saved."""
    trained = build(layout, seed=11)
    state = state_of(trained, rank)
    own = state["own"]
    own.value = {"rank": -1, "noise": torch.zeros(5)}
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        loaded = ckpt.load(into=state)
    assert loaded is not None
    expected = torch.load(Path(directory, "expected.pt"))
    problems = differences(expected, whole_state(trained))
    problems += [] if state["step"] == 7 else ["step"]
    if rank < saved_by(directory):
        problems += [] if own.value["rank"] == rank and own.value["noise"][0] == rank else ["own"]
    else:
        problems += [] if own.value["rank"] == -1 else ["own, of a rank that was not there"]
    return problems


def saved_by(directory: str) -> int:
    return int(Path(directory, "ranks").read_text())


def load_stock(rank: int, directory: str, layout: str) -> list[str]:
    """By ``dcp.load``, into a state spread in another way."""
    model, optimizer = build(layout, seed=11)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=str(Path(directory, "run", "step-00000007")))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return differences(torch.load(Path(directory, "expected.pt")), whole_state((model, optimizer)))


@contextmanager
def no_collectives() -> Iterator[None]:
    """Everything in torch.distributed that waits for another rank raises."""
    names = [
        *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
        *("barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter"),
        *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv", "new_group"),
        *("batch_isend_irecv", "monitored_barrier"),
    ]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective was called")

    patches = [mock.patch.object(dist, name, refuse) for name in names]
    patches += [mock.patch.object(dist.distributed_c10d, name, refuse) for name in names]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def save_without_collectives(rank: int, directory: str, layout: str) -> int:
    """No save calls a collective in the training thread; those after the first do not ask the store either."""
    trained = build(layout, seed=3)
    state = state_of(trained, rank)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        with no_collectives():
            ckpt.save(1, state).upload_completion.result(60)
        rendezvous = board_of(ckpt)
        here: list[str] = []
        asked = mock.patch.multiple(
            rendezvous,
            read=_noting(rendezvous.read, here),
            add=_noting(rendezvous.add, here),
            post=_noting(rendezvous.post, here),
        )
        with no_collectives(), asked:
            for step in range(2, 6):
                ckpt.save(step, state).upload_completion.result(60)
        assert not here, here
        return len(ckpt.checkpoints())


def _noting(method: Callable[..., Any], here: list[str]) -> Callable[..., Any]:
    """Notes calls in the main thread."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            here.append(str(args))
        return method(*args, **kwargs)

    return call


TRAINER_POINTS = ("save.planned", "save.copied", "save.handed-over")
WORKER_POINTS = ("part.begin", "part.write", "part.synced", "part.receipt")
COMMITTED_ALL_THE_SAME = ("save.handed-over", "part.receipt")
"""By the workers of the rank that was killed; by the others, who find its receipt."""


def die_in_save(rank: int, directory: str, point: str, victim: int, run: str = "") -> dict[str, Any]:
    """One rank is killed in its second save: its trainer at one of its points, or all of its processes while a worker is at
    one of a worker's. What the others say. ``run``: where, if not in ``directory``."""
    faults = faults_of_this_process(Path(directory, "faults")) if rank == victim else None
    timeout_secs = 50 if point in COMMITTED_ALL_THE_SAME else 3
    trained = build("fsdp", seed=3)
    state = state_of(trained, rank)
    with Checkpointer(run or Path(directory, "run"), {**CONFIG, "ranks": {"timeout_secs": timeout_secs}}) as ckpt:
        ckpt._group.turn_secs = ckpt._group.discard_secs = 0.2
        ckpt.save(1, state).upload_completion.result(60)
        dist.barrier()
        if faults is not None:
            _die(ckpt, state, faults, point)
        error = ckpt.save(2, state).upload_completion.exception(60)
    assert error is None or isinstance(error, RankFailedError), error
    return {"error": str(error or ""), "ranks": [] if error is None else list(error.ranks)}


def _die(ckpt: Checkpointer, state: dict[str, Any], faults: Faults, point: str) -> None:
    if point in TRAINER_POINTS:
        faults.arm(point, "kill")
        ckpt.save(2, state).upload_completion.result(60)
    hold = faults.hold(point)
    ckpt.save(2, state)
    hold.wait()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def fail_in_save(rank: int, directory: str, victim: int) -> dict[str, Any]:
    """One rank's disk fails in its second save, and nobody waits for its part; the next one works."""
    faults = faults_of_this_process(Path(directory, "faults")) if rank == victim else None
    trained = build("fsdp", seed=3)
    state = state_of(trained, rank)
    with Checkpointer(Path(directory, "run"), {**CONFIG, "ranks": {"timeout_secs": FOR_EVER_SECS}}) as ckpt:
        ckpt.save(1, state).upload_completion.result(60)
        if faults is not None:
            faults.arm("part.write", "errno ENOSPC")
        error = ckpt.save(2, state).upload_completion.exception(60)
        ckpt.save(3, state).upload_completion.result(60)
        steps = [info.step for info in ckpt.checkpoints()]
    return {"kind": type(error).__name__, "error": str(error), "steps": steps}


def go_on_after_a_failure(rank: int, directory: str, victim: int, on_save_error: str) -> dict[str, Any]:
    """One rank's disk fails in the second save, and nobody reads the error. Each step has a collective, in which a rank that
    has left its loop would be waited for. Returns the steps whose ``save()`` raised, and the checkpoints."""
    faults = faults_of_this_process(Path(directory, "faults")) if rank == victim else None
    state = state_of(build("fsdp", seed=3), rank)
    raised = []
    with Checkpointer(Path(directory, "run"), {**CONFIG, "persistence": {"on_save_error": on_save_error}}) as ckpt:
        for step in range(1, 8):
            dist.barrier()
            if step == 2:
                ckpt._run.saver.wait_for_saves(of_step(ckpt, 1))  # so that the fault meets the second
                if faults is not None:
                    faults.arm("part.write", "errno ENOSPC")
            try:
                ckpt.save(step, state)
            except (StorageError, RankFailedError):
                raised.append(step)
            if step == 5:
                for earlier in range(1, 6):
                    ckpt._run.saver.wait_for_saves(of_step(ckpt, earlier))
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        return {"raised": raised, "steps": [info.step for info in ckpt.checkpoints()]}


def save_unequal(rank: int, directory: str) -> str:
    """A plain tensor that is not the same on all ranks."""
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        try:
            ckpt.save(1, {"x": torch.zeros(3 + rank)})
        except InconsistentRanksError as error:
            return str(error)
    return "saved"


def save_stages(rank: int, directory: str) -> dict[str, Any]:
    """As the stages of a pipeline: some names on all ranks, some on two of them, some on one."""
    state: dict[str, Any] = {"shared": torch.arange(1000), "note": {"of all": 1}}
    state[f"stage {rank // 2}"] = {"weight": torch.full((700_000,), float(rank // 2)), "name": f"stage {rank // 2}"}
    state[f"only {rank}"] = torch.full((4,), rank)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        handle = ckpt.save(1, state)
        handle.upload_completion.result(60)
    return {"nbytes": handle.report.nbytes, "tensors": handle.report.num_tensors}


def structure_of_share(rank: int, directory: str, layout: str) -> dict[str, Any]:
    """Of what the rank writes, as it is in its record; and the paths of all that it has."""
    state = state_of(build(layout, seed=3), rank)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        share = Partitioner(ckpt._group).take(flatten(state, rank), "a save")
        dist.barrier()
    return {"structure": share.structure, "paths": flatten(state, rank).paths}


def save_replicated(rank: int, directory: str, mib: int) -> int:
    """Bytes of tensors that this rank writes of a state that is the same on all."""
    generator = torch.Generator().manual_seed(5)
    sizes = [0.31, 0.002, 0.25, 0.0001, 0.2, 0.1, 0.05, 0.08]
    state = {
        f"w{i}": torch.rand(max(1, int(share * mib * 1024)), 256, generator=generator) for i, share in enumerate(sizes)
    }
    state["tied"] = state["w0"]
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        handle = ckpt.save(1, state)
        handle.upload_completion.result(120)
        target = {name: torch.zeros_like(value) for name, value in state.items()}
        target["tied"] = target["w0"]
        ckpt.load(into=target)
        assert all(torch.equal(target[name], state[name]) for name in state)
    return handle.report.nbytes


def save_after_change(rank: int, directory: str) -> list[int]:
    """The structure changes on all ranks: it is settled again."""
    state: dict[str, Any] = {"a": torch.ones(10)}
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(1, state).upload_completion.result(60)
        state["b"] = torch.full((5,), 2.0)
        ckpt.save(2, state).upload_completion.result(60)
        found = ckpt.load(2)
    assert found is not None
    return [int(found.state["a"].sum()), int(found.state["b"].sum())]


def change_alone(rank: int, directory: str) -> dict[str, Any]:
    """The structure changes on rank 1 only."""
    state: dict[str, Any] = {"a": torch.ones(10)}
    with Checkpointer(Path(directory, "run"), {**CONFIG, "ranks": {"timeout_secs": 2}}) as ckpt:
        ckpt.save(1, state).upload_completion.result(60)
        if rank == 1:
            state["b"] = torch.ones(5)
        try:
            error = ckpt.save(2, state).upload_completion.exception(60)
        except RankFailedError as raised:
            error = raised
        steps = [info.step for info in ckpt.checkpoints()]
    return {"error": str(error), "steps": steps}


def load_damaged(rank: int, directory: str, damage: bool) -> dict[str, Any]:
    """The newest checkpoint is damaged in what only one rank reads: all fall back to the one before."""
    trained = build("fsdp", seed=3)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(trained, rank)).upload_completion.result(60)
        dist.barrier()
        if rank == 0 and damage:
            flip(Path(directory, "run", "step-00000002", "__1_0.distcp"))
        dist.barrier()
        other = build("fsdp", seed=5)
        loaded = ckpt.load(into=state_of(other, rank))
    assert loaded is not None
    problems = differences(whole_state(trained), whole_state(other))
    return {"step": loaded.step, "problems": problems}


def flip(path: Path) -> None:
    """Every byte of a file's second half."""
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half:] = bytes(byte ^ 255 for byte in data[half:])
    path.write_bytes(data)


def not_one_directory(rank: int, directory: str) -> str:
    try:
        Checkpointer(Path(directory, f"run-{rank}"), {**CONFIG, "ranks": {"timeout_secs": 2}}).close()
    except (UsageError, RankFailedError) as error:
        return str(error)
    return "opened"


def guarded(rank: int, directory: str, layout: str) -> list[int]:
    """With the optimizer guarded, training goes on while the snapshot is taken; each checkpoint is that of its step."""
    trained = build(layout, seed=3)
    model, optimizer = trained
    expected = []
    with Checkpointer(Path(directory, "run"), {**CONFIG, "staging": {"verify": True}}) as ckpt:
        ckpt.guard(optimizer)
        for step in range(1, 4):
            ckpt.save(step, state_of(trained, rank))
            expected.append(whole_state(trained))
            sum(parameter.sum() for parameter in model.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
    bad = []
    for step, state in enumerate(expected, 1):
        other = build(layout, seed=9)
        with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
            ckpt.load(step, into=state_of(other, rank))
        if differences(state, whole_state(other)):
            bad.append(step)
    return bad


def delete_the_newest_on_one_rank(rank: int, directory: str) -> list[int | None]:
    """What each rank finds then: it does not wait to see what was deleted."""
    found: list[int | None] = []
    with (
        mock.patch("stager.loading.joint_loader._VISIBLE_SECS", FOR_EVER_SECS),
        Checkpointer(Path(directory, "run"), CONFIG) as ckpt,
    ):
        for step in (1, 2):
            ckpt.save(step, {"x": torch.ones(2)}).upload_completion.result(60)
        for step in (2, 1):
            dist.barrier()
            if rank == 1:
                ckpt.delete(step)
            dist.barrier()
            with mock.patch.object(ckpt._group, "timeout_secs", FOR_EVER_SECS):
                found.append(ckpt.latest_step())
    return found


def delete_on_each_rank(rank: int, directory: str) -> tuple[list[int], list[int]]:
    """Which steps this rank has removed, and which are left."""
    trained = build("plain", seed=3)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(trained, rank)).upload_completion.result(60)
        removed = ckpt.delete(1).steps(PruneFate.REMOVED)
        dist.barrier()
        return removed, [info.step for info in ckpt.checkpoints()]


def save_files(rank: int, directory: str) -> dict[str, str]:
    """Each rank gives a file with its rank."""
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(1, {"x": torch.ones(3)}, files={"who": str(rank).encode()}).upload_completion.result(60)
        return _texts(ckpt.load(1, into={"x": torch.zeros(3)}).files)


def _texts(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: data.decode() for name, data in files.items()}


def save_to_paths(rank: int, directory: str, layout: str) -> list[Any]:
    """Save to two directories, load, delete one on rank 0 only, save again in its place."""
    trained = build(layout, seed=3)
    first, second = Path(directory, "a", "checkpoint-1"), Path(directory, "b", "last.ckpt")
    with PathCheckpointer(CONFIG) as ckpt:
        for path in (first, second):
            ckpt.save(path, state_of(trained, rank), files={"who": str(rank).encode()}).upload_completion.result(60)
        found = []
        for path in (first, second):
            again = build(layout, seed=9)
            loaded = ckpt.load(path, into=state_of(again, rank))
            found.append((loaded.step, _texts(loaded.files), differences(whole_state(trained), whole_state(again))))
        if rank == 0:
            ckpt.delete(first)
        dist.barrier()
        found.append(first.exists())
        ckpt.save(first, state_of(trained, rank), step=9).upload_completion.result(60)
        found.append(ckpt.load(first, into=state_of(build(layout, seed=9), rank)).step)
    return found


def save_with_export(rank: int, directory: str) -> list[Any]:
    """1. Rank 0 has weights exported 2. it refuses an export to the same directory 3. the next one is made."""
    model, _ = build("fsdp", seed=3)
    out = Path(directory, "hf-{step}")
    found: list[Any] = []
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:

        def save(step: int, to: Path) -> Any:
            export = WeightsExport(to, keys="model", strip_prefix="model.")
            return ckpt.save(step, {"model": model}, export=export)

        first = save(1, out)
        assert first.upload_completion.result(60).step == 1
        found.append(None if first.export_completion is None else first.export_completion.result(60).step)
        try:
            found.append(type(save(2, Path(directory, "hf-1")).upload_completion.exception(60)).__name__)
        except UsageError as error:
            found.append(type(error).__name__)
        third = save(3, out)
        assert third.upload_completion.result(60).step == 3
        found.append(None if third.export_completion is None else third.export_completion.result(60).step)
    dist.barrier()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded = load_checkpoint(Path(directory, "hf-3")).state
    return [*found, {name: list(tensor.shape) for name, tensor in loaded.items()} == shapes]


def delete_in_flight_on_rank_0(rank: int, directory: str) -> list[Any]:
    """1. the workers of rank 1 are held while they write 2. rank 0 deletes the save 3. the next save of all is committed."""
    faults = faults_of_this_process(Path(directory, f"faults-{rank}"))
    hold = faults.hold("part.write") if rank == 1 else None
    state = {"x": torch.ones(100_000), "own": PerRank(torch.full((5,), float(rank)))}
    with PathCheckpointer(CONFIG) as ckpt:
        path = Path(directory, "a", "last.ckpt")
        handle = ckpt.save(path, state)
        if hold is not None:
            hold.wait()
        dist.barrier()
        if rank == 0:
            ckpt.delete(path)
        dist.barrier()
        if hold is not None:
            hold.release()
        ckpt.wait_for(path)
        found = [str(handle.state), handle.upload_completion.cancelled(), path.exists()]
        again = ckpt.save(path, state, step=4).upload_completion.result(60)
        return [*found, again.step]
