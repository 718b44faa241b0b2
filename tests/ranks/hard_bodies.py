"""What the ranks of the tests do when not all goes well, or not all are alike."""

from __future__ import annotations

import logging
import shutil
import threading
from concurrent.futures import wait
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stager import Checkpointer, PerRank, RankFailedError, StagerError
from stager.loading import joint_loader as loading
from stager.ranks import keys
from stager.ranks.rank_group import RankGroup
from stager.state.flatten import flatten
from stager.workers.checkpoint.layout.structure import describe
from tests.faults import faults_of_this_process
from tests.ranks.bodies import CONFIG, FOR_EVER_SECS, board_of

PATIENT = {**CONFIG, "ranks": {"timeout_secs": FOR_EVER_SECS}}


def own_structure_changes(rank: int, directory: str) -> list[str]:
    """What is in ``PerRank`` changes its shape and number on one rank; another value becomes a float there."""
    errors = []
    state: dict[str, Any] = {"a": torch.ones(10), "best": None, "own": PerRank({"queue": [torch.ones(3)]})}
    with Checkpointer(Path(directory, "run"), {**CONFIG, "ranks": {"timeout_secs": 3}}) as ckpt:
        for step in range(1, 4):
            try:
                ckpt.save(step, state).upload_completion.result(60)
            except RankFailedError as error:
                errors.append(f"{step}: {error}")
            if rank == 1:
                state["own"].value["queue"].append(torch.ones(3 + step))
                state["best"] = 0.5
        dist.barrier()
        if not errors:
            target = {"own": PerRank({"queue": [torch.zeros(3)]})}
            ckpt.load(3, into=target, strict=False)
            errors += [] if len(target["own"].value["queue"]) == (3 if rank == 1 else 1) else ["queue"]
    return errors


def save_after_a_change_alone(rank: int, directory: str) -> list[str]:
    """The structure changes on rank 1, and on rank 0 only after the next save, which fails; then they are alike again."""
    state: dict[str, Any] = {"a": torch.ones(10)}
    outcomes = []
    with Checkpointer(Path(directory, "run"), {**CONFIG, "ranks": {"timeout_secs": 2}}) as ckpt:
        for step in range(1, 5):
            if step == (2 if rank == 1 else 3):
                state["b"] = torch.ones(5)
            try:
                ckpt.save(step, state).upload_completion.result(60)
            except RankFailedError:
                outcomes.append("failed")
            else:
                outcomes.append("saved")
            dist.barrier()
    return outcomes


def fail_once_and_go_on(rank: int, directory: str) -> list[int]:
    """Rank 0 cannot save step 2; nobody looks at a Future, and errors of ``save()`` are only logged."""
    state: dict[str, Any] = {"a": torch.ones(10)}
    completions: list[Any] = []
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        for step in range(1, 6):
            state["own"] = PerRank({"value": threading.Lock() if step == 2 and rank == 0 else 1})
            with suppress(StagerError):
                completions.append(ckpt.save(step, state).upload_completion)
            wait(completions)  # which is not looking at their errors
        steps = [info.step for info in ckpt.checkpoints()]
        with suppress(StagerError):
            ckpt.close()
    return steps


def subsets_that_overlap(rank: int, directory: str) -> int:
    """Rank 0 shares one name with rank 1 and another with rank 2."""
    state: dict[str, Any] = {"all": torch.ones(4)}
    big = torch.arange(3_000_000, dtype=torch.float32).reshape(3000, 1000)
    if rank in (0, 1):
        state |= {"first": torch.full((100,), 1.0), "big": big, "note": "of 0 and 1"}
    if rank in (0, 2):
        state |= {"second": torch.full((100,), 2.0), "large": big + 1, "word": "of 0 and 2"}
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(1, state).upload_completion.result(60)
        loaded = ckpt.load()
    assert loaded is not None
    assert torch.equal(loaded.state["big"], big)
    assert torch.equal(loaded.state["large"], big + 1)
    return len(loaded.state)


def call_back(rank: int, directory: str) -> list[str]:
    """A callback of a Future calls what would wait for it."""
    said: list[str] = []
    has_said = threading.Event()
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:

        def callback(_: Any) -> None:
            for call in (ckpt.close, lambda: ckpt.save(9, {"a": 1}), ckpt.wait_for_staging):
                try:
                    call()
                except Exception as error:  # noqa: BLE001  # it goes to the test
                    said.append(type(error).__name__)
            has_said.set()

        handle = ckpt.save(1, {"a": torch.ones(10)})
        handle.upload_completion.add_done_callback(callback)
        handle.upload_completion.result(60)
        assert has_said.wait(60)
    return said


def pieces(rank: int, directory: str) -> int:
    """Rank 0 has more than its buffers hold, the other ranks less."""
    config = {**CONFIG, "arena": {"max_host_bytes": "24MiB", "buffers": 2}}
    state = {"own": PerRank(torch.full(((40 if rank == 0 else 1) << 18,), float(rank)))}
    with Checkpointer(Path(directory, "run"), config) as ckpt:
        ckpt.save(1, state).upload_completion.result(60)
        target = {"own": PerRank(torch.zeros_like(state["own"].value))}
        ckpt.load(into=target)
    return int(target["own"].value.eq(rank).all())


def apart_with_shards(rank: int, directory: str) -> str:
    """Each rank saves for itself, a tensor of which it has a part."""
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    with Checkpointer(Path(directory, f"run-{rank}"), {"workers": {"count": 1}, "ranks": {"together": False}}) as ckpt:
        try:
            ckpt.save(1, {"x": tensor}).upload_completion.result(60)
        except StagerError as error:
            return f"{type(error).__name__}: {error}"
        return "saved" if ckpt.latest() else "saved, and lost"


def empty_everywhere(rank: int, directory: str) -> dict[str, list[int]]:
    """DTensors without elements, replicated and sharded; rank 1 comes first."""
    mesh = init_device_mesh("cpu", (2,))
    state: dict[str, Any] = {
        "r": DTensor.from_local(torch.zeros(0), mesh, [Replicate()]),
        "s": distribute_tensor(torch.zeros(0, 4), mesh, [Shard(1)]),
        "t": distribute_tensor(torch.zeros(0, 4), mesh, [Shard(0)]),
        "one": distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)]),
        "scalar": distribute_tensor(torch.tensor(7.0), mesh, [Replicate()]),
    }
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        if rank == 0:  # the second of the mesh is the first to be counted
            _wait_for(1, ckpt)
        ckpt.save(1, state).upload_completion.result(60)
        loaded = ckpt.load()
        fresh: dict[str, Any] = {name: torch.zeros_like(value) for name, value in state.items()}
        ckpt.load(into=fresh)
    assert loaded is not None
    assert fresh["scalar"].full_tensor() == 7
    assert fresh["one"].full_tensor().eq(1).all()
    return {name: list(value.shape) for name, value in loaded.state.items()}


def tied_on_one_rank(rank: int, directory: str, sharded: bool) -> str:
    """Rank 0 has one tensor where rank 1 has two, deals otherwise, and leaves to rank 1 what that leaves to rank 0."""
    state: dict[str, Any] = {name: torch.full((4,), 1.0) for name in "abcd"}
    if rank == 0:
        state["d"] = state["c"]
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        state = {name: DTensor.from_local(value, mesh, [Replicate()]) for name, value in state.items()}
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        if rank == 1:  # the second to be counted
            _wait_for(0, ckpt)
        try:
            ckpt.save(1, state).upload_completion.result(60)
        except StagerError as error:
            return f"{type(error).__name__}: {error}"
    return "saved"


def _wait_for(rank: int, ckpt: Checkpointer) -> None:
    """Until it has come to settle the first save of step 1."""
    group = ckpt._group
    to_come = RankGroup(group.rank, group.num_ranks, group.rendezvous, nonce=group.nonce).save_id(1)
    assert group.rendezvous.wait(f"{keys.agreement(to_come)}/here/{rank}", 60) is not None


def slow_rank(rank: int, directory: str) -> dict[str, Any]:
    """Rank 1's worker is held in the middle of its part until rank 0 has given the save up."""
    faults = faults_of_this_process(Path(directory, "faults")) if rank == 1 else None
    with Checkpointer(Path(directory, "run"), {**CONFIG, "ranks": {"timeout_secs": 2}}) as ckpt:
        state = {"own": PerRank(torch.ones(1000))}
        ckpt.save(1, state).upload_completion.result(60)
        rendezvous = board_of(ckpt)
        hold = faults.hold("part.write") if faults is not None else None
        dist.barrier()
        handle = ckpt.save(2, state)
        if hold is not None:
            hold.wait()
            assert rendezvous.wait("given-up", 60) is not None
            hold.release()
        error = handle.upload_completion.exception(60)
        if rank == 0:
            rendezvous.post("given-up", b"")
        dist.barrier()
        steps = [info.step for info in ckpt.checkpoints()]
    return {"error": type(error).__name__, "text": str(error), "steps": steps}


def load_what_is_not_there(rank: int, directory: str) -> str:
    with what_is_not_visible_is_waited_for_for_ever(), Checkpointer(Path(directory, "run"), PATIENT) as ckpt:
        ckpt.save(1, {"a": torch.ones(3)}).upload_completion.result(60)
        try:
            ckpt.load(99, into={"a": torch.ones(3)})
        except StagerError as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"


def what_is_not_visible_is_waited_for_for_ever() -> AbstractContextManager[object]:
    """A rank that waits for a directory that another rank has seen hangs, instead of going on after
    a minute or the ranks' timeout, whichever is less: :data:`PATIENT` is for the latter."""
    return mock.patch.object(loading, "_VISIBLE_SECS", FOR_EVER_SECS)


class _CannotTell:
    def state_dict(self) -> dict[str, Any]:
        raise ValueError("no state")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def unstageable_at_first(rank: int, directory: str) -> dict[str, Any]:
    """One rank's first save fails before it settles anything, and nobody waits for it."""
    state: dict[str, Any] = {"a": torch.ones(3)}
    bad = {"bad": _CannotTell()} if rank == 1 else {}
    with Checkpointer(Path(directory, "run"), PATIENT) as ckpt:
        try:
            ckpt.save(1, {**state, **bad}).upload_completion.result(60)
            text = ""
        except StagerError as error:
            text = f"{type(error).__name__}: {error}"
        dist.barrier()
        ckpt.save(2, state).upload_completion.result(60)
        steps = [info.step for info in ckpt.checkpoints()]
    return {"text": text, "steps": steps}


def ask_for_what_was_removed(rank: int, directory: str) -> list[int]:
    """The newest checkpoint is removed by hand, when this rank has seen it: ``latest()`` does not wait for it."""
    with what_is_not_visible_is_waited_for_for_ever(), Checkpointer(Path(directory, "run"), PATIENT) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"a": torch.ones(3)}).upload_completion.result(60)
        newest = ckpt.latest()
        assert newest is not None
        assert newest.step == 2
        dist.barrier()
        if rank == 0:
            shutil.rmtree(newest.path)
        dist.barrier()
        found = [ckpt.latest() for _ in range(2)]
    return [info.step for info in found if info is not None]


def save_unequal_values(rank: int, directory: str) -> list[str]:
    """Large tensors that differ between ranks, in a few rows; and nested ones."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("stager").addHandler(handler)
    experts = torch.zeros(500_000)
    experts[250_000:] = rank
    state = {"experts": experts, "same": torch.ones(500_000), "nested": torch.nested.nested_tensor([torch.ones(2)])}
    outcomes = []
    for differing in ("error", "warn"):
        with Checkpointer(Path(directory, differing), {**CONFIG, "ranks": {"differing": differing}}) as ckpt:
            try:
                ckpt.save(1, state).upload_completion.result(60)
                outcomes.append("saved")
            except StagerError as error:
                outcomes.append(str(error))
    return [*outcomes, *(text for text in said if text.startswith("not the same"))]


def keys_of_one_name(rank: int, directory: str, case: str, size: str) -> str:
    """Save keys whose names in DCP are equal. Returns the error, or "whole" if what is loaded is what the ranks gave."""
    value: Any = {"small": torch.ones(3), "large": torch.ones(300_000), "number": 5}[size]
    states: list[dict[str, Any]] = {
        "dots": [{"a.b": value}, {"a": {"b": value}}],
        "int and str": [{"x": {1: value}}, {"x": {"1": value}}],
        "on each rank": [{"a.b": value, "a": {"b": value + 1}, "x": {1: value + 2, "1": value + 3}}] * 2,
    }[case]
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        try:
            ckpt.save(1, states[rank]).upload_completion.result(60)
        except StagerError as error:
            return f"{type(error).__name__}: {error}"
        loaded = ckpt.load()
    assert loaded is not None
    given = {describe(path): leaf for state in states for path, leaf in zip(*_leaves(state), strict=True)}
    found = dict(zip(map(describe, _leaves(loaded.state)[0]), _leaves(loaded.state)[1], strict=True))
    is_whole = given.keys() == found.keys() and all(torch.equal(found[name], given[name]) for name in given)
    return "whole" if is_whole else f"torn: {found}"


def _leaves(state: dict[str, Any]) -> tuple[Any, Any]:
    tree = flatten(state)
    return tree.paths, list(map(torch.as_tensor, tree.leaves))
