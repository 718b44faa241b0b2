"""What the ranks of the tests of loading do: stages that hold different names, and orders that differ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stager import Checkpointer, PerRank, StagerError, load_checkpoint
from tests.ranks.bodies import CONFIG, FOR_EVER_SECS


def stage(rank: int, value: float) -> dict[str, Any]:
    """What a pipeline stage has: tensors, a module and a plain value of its own, and what all have."""
    module = nn.Module()
    module.add_module(f"layer{rank}", nn.Linear(2, 2, bias=False))
    nn.init.constant_(module.get_submodule(f"layer{rank}").weight, value)  # type: ignore[arg-type]  # a tensor
    return {
        "model": {f"layer{rank}.w": torch.full((3,), value)},
        "nested": {"shared": torch.full((1,), 7.0), f"stage{rank}": {"deep": [torch.full((2,), value)]}},
        "module": module,
        f"own{rank}": {"n": value},
        "step": 5,
    }


def weight_of(state: dict[str, Any], rank: int) -> float:
    return float(state["module"].get_submodule(f"layer{rank}").weight[0, 0])


def load_stages(rank: int, directory: str) -> list[Any]:
    """Each rank gets its own names, strictly; what is missing or unexpected on all is said."""
    said: list[Any] = []
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(5, stage(rank, 1.0 + rank)).upload_completion.result(60)
        dist.barrier()
        into = stage(rank, 0.0)
        tensor = into["model"][f"layer{rank}.w"]
        loaded = ckpt.load(into=into)
        assert loaded is not None
        said.append([sorted(into["model"]), float(tensor[0]), weight_of(into, rank), sorted(into["nested"])])
        said.append([list(loaded.missing), list(loaded.unexpected)])

        into = stage(rank, 0.0)
        into["model"]["layer9.w"] = torch.zeros(3)  # on every rank
        said.append(message_of(ckpt, into))
        assert not into["model"][f"layer{rank}.w"].any()

        into = stage(rank, 0.0)
        if rank == 0:  # nobody has what rank 0 leaves out
            del into["module"], into["own0"], into["model"]["layer0.w"]
            into["module"] = nn.Module()
            into["module"].add_module("layer0", nn.Identity())
        said.append(message_of(ckpt, into))
        into = stage(rank, 0.0)
        path = loaded.path
        by_path = load_checkpoint(path, into=into)
        said.append([weight_of(into, rank), float(into["model"][f"layer{rank}.w"][0]), list(by_path.unexpected)])
        alone: dict[str, Any] = {"step": 0}
        if rank == 1:  # no other rank calls it
            load_checkpoint(path, into=alone)
        said.append(alone)
    return said


def message_of(ckpt: Checkpointer, into: Any) -> str:
    try:
        ckpt.load(into=into)
    except StagerError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


class Collective:
    """Takes its state by a collective: for ever, if another rank takes another object's."""

    def __init__(self, name: str, value: float = 0.0) -> None:
        self.name, self.value, self.others = name, value, [""]

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, self.name)
        self.others, self.value = names, state["value"]


def objects(value: float) -> list[Collective]:
    return [Collective(name, value) for name in ("a", "b", "c", "d", "e", "f")]


def in_containers(made: list[Collective], *, turned: bool) -> dict[str, Any]:
    a, b, c, d, e, f = made
    many = {f"n{i}": i for i in range(3)}
    state = {
        "top": a,
        "in": {"b": b, "c": {"x": c, "y": [{"d": d, "n": 1}, 2]}, **many},
        7: {"e": e, 1: {"f": f}, "w": torch.ones(1)},
    }
    return turn(state) if turned else state


def turn(value: Any) -> Any:
    """The same, each mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: turn(value[key]) for key in reversed(value)}
    return [turn(one) for one in value] if isinstance(value, list) else value


def load_in_other_orders(rank: int, directory: str) -> list[list[str]]:
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(1, in_containers(objects(3.0), turned=False)).upload_completion.result(60)
        dist.barrier()
        made = objects(0.0)
        ckpt.load(into=in_containers(made, turned=rank == 1))
    assert all(one.value == 3.0 for one in made)
    return [one.others for one in made]


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def save_own(rank: int, directory: str) -> None:
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        own = {"position": rank, "noise": torch.full((2,), float(rank))}
        state = {"loader": PerRank(own), "deep": {"rng": PerRank(rank * 10)}, "n": 1}
        ckpt.save(1, state).upload_completion.result(60)


def load_own(rank: int, directory: str) -> dict[str, Any]:
    heard = Warnings()
    logging.getLogger("stager").addHandler(heard)
    into: dict[str, Any] = {
        "loader": PerRank({"position": -1, "noise": torch.zeros(2)}),
        "deep": {"rng": PerRank(-1)},
        "n": 0,
    }
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        loaded = ckpt.load(into=into)
    logging.getLogger("stager").removeHandler(heard)
    assert loaded is not None
    left = {name: {saver: describe(one) for saver, one in values.items()} for name, values in loaded.per_rank.items()}
    own = [into["loader"].value["position"], into["deep"]["rng"].value]
    return {"left": left, "own": own, "warned": [text for text in heard.texts if "PerRank" in text]}


def describe(value: Any) -> Any:
    return [value["position"], value["noise"].tolist()] if isinstance(value, dict) else value


def one_rank_fails(rank: int, directory: str) -> list[str]:
    """Before the ranks compare their names, rank 1 fails: nobody waits for it."""

    class Failing(Collective):
        def state_dict(self) -> dict[str, Any]:
            raise ValueError("not built yet")

    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(1, {"a": {"w": torch.ones(1)}, "m": nn.Linear(1, 1)}).upload_completion.result(60)
        dist.barrier()
        module = nn.Linear(1, 1)
        if rank == 1:
            module.register_state_dict_pre_hook(lambda *_: Failing("x").state_dict())
        said = [message_of(ckpt, {"a": {"w": torch.zeros(1)}, "m": module})]
        said.append(message_of(ckpt, {"a": {"w": torch.zeros(1)}, "m": nn.Linear(1, 1)}))
    return said


def mismatch_on_one_rank(rank: int, directory: str) -> list[Any]:
    """What one rank cannot load is loaded on none, and nothing is changed."""
    said: list[Any] = []
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(5, {"w": torch.ones(3), "n": 1, "k": 2}).upload_completion.result(60)
        dist.barrier()
        for kind in ("shape", "name", "object"):
            into: dict[str, Any] = {"w": torch.zeros(3), "n": 0, "k": 0}
            if rank == 1:
                if kind == "shape":
                    into["w"] = torch.zeros(4)
                elif kind == "name":
                    into["gone"] = torch.zeros(2)
                else:
                    into["k"] = nn.Linear(1, 1)
            before = into["w"].clone()
            said.append(message_of(ckpt, into))
            assert torch.equal(into["w"], before) and into["n"] == 0, kind
        said.append(message_of(ckpt, {"w": torch.zeros(3), "n": 0, "k": 0}))
    return said


def arguments_of_one_rank(rank: int, directory: str) -> list[str]:
    """What one rank gives and cannot be meant fails the load on all, at once; the next load works."""
    said: list[str] = []
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt._group.timeout_secs = FOR_EVER_SECS  # who waits for the other one hangs
        ckpt.save(5, {"w": torch.ones(3)}).upload_completion.result(60)
        dist.barrier()
        for wrong in (0, 1):
            said.append(message_of(ckpt, 7 if rank == wrong else {"w": torch.zeros(3)}))
            said.append(message_of(ckpt, {"w": torch.zeros(3)}))
    return said


def damaged_for_one_rank(rank: int, directory: str) -> list[Any]:
    """Only rank 1 reads the damaged bytes. What each rank loads, skips, warns of, and tells its listeners."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]  # a handler that only collects
    logging.getLogger("stager").addHandler(handler)
    events: list[str] = []
    run = Path(directory, "run")
    with Checkpointer(run, CONFIG, on_event=lambda event: events.append(event.name)) as ckpt:
        for step in (1, 2):
            own = PerRank({"t": torch.full((5000,), step)})
            ckpt.save(step, {"w": torch.ones(3), "own": own}).upload_completion.result(60)
        dist.barrier()
        if rank == 0:
            path = run / "step-00000002" / "__1_0.distcp"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        dist.barrier()
        loaded = ckpt.load(into={"w": torch.zeros(3), "own": PerRank({"t": torch.zeros(5000, dtype=torch.int64)})})
        assert loaded is not None
        skipped = [one.name for one in ckpt.skipped]
    return [loaded.step, skipped, [one.getMessage()[:40] for one in records], "fell back" in events]


def save_freed_memory(rank: int, directory: str) -> list[str]:
    """A storage that one rank has resized fails that save with the name, and no later one."""
    said: list[str] = []
    tensor = torch.ones(1 << 18)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        for step in (1, 2, 3):
            if rank == 1 and step == 2:
                tensor.untyped_storage().resize_(64)
            try:
                ckpt.save(step, {"w": {"a": tensor}}).upload_completion.result(60)
                said.append("saved")
            except StagerError as error:
                said.append(f"{type(error).__name__}: {error}")
            tensor = torch.ones(1 << 18)
            dist.barrier()
    return said
