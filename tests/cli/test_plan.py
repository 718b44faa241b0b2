"""What a state needs, and that this is what a real Checkpointer takes."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer
from stager.config import load_config
from stager.planning import Measured
from tests.cli.conftest import STEPS, Outcome

MODULE = """
import torch
from collections import OrderedDict
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(77), requires_grad=False)

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))

def module():
    print("this must not get into the output")
    torch.manual_seed(0)
    return Tied()

def large():
    return nn.Sequential(*(nn.Linear(60000, 60000) for _ in range(10)))

def _with(make, **options):
    model = module()
    return model, make(model.parameters(), **options)

def adamw():
    return _with(torch.optim.AdamW)

def amsgrad():
    return _with(torch.optim.Adam, amsgrad=True)

def sgd():
    return _with(torch.optim.SGD, lr=0.1, momentum=0.9)

def plain_sgd():
    return _with(torch.optim.SGD, lr=0.1)

def stepped():
    model, optimizer = adamw()
    model(torch.arange(10)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": 5}

def rprop():
    return _with(torch.optim.Rprop)

def state():
    from tests.states import everything
    return everything()

def scalars():
    return {"weights": {str(i): torch.zeros(1000) for i in range(8)}, "odd": torch.zeros(5, 3), "one": torch.tensor(1.0)}

def fails():
    raise ValueError("no such file")

def leaves():
    raise SystemExit(3)

def nothing():
    return 5

def unstageable():
    return {"a": {"b": lambda: 0}}

number = 5
"""
_names = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the working directory that has the callables above."""
    name = f"planned_{next(_names)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def plan(*arguments: object) -> Any:
    outcome = Outcome("plan", "--json", *arguments)
    assert outcome.code == (0 if outcome.json["fits"] else 1)
    return outcome.json


def call(module: str, name: str) -> Any:
    return getattr(sys.modules[module], name)()


class Real:
    """What a Checkpointer takes for a state: buffers, directory, descriptors."""

    def __init__(self, directory: Path, state: Any, **arena: Any) -> None:
        fds = len(os.listdir("/proc/self/fd"))
        with Checkpointer(directory, {"arena": arena}) as checkpointer:
            checkpointer.warmup(state)
            self.arena_nbytes = checkpointer._run.arena.nbytes
            handle = checkpointer.save(0, state)
            path = Path(handle.upload_completion.result().path)
            self.report = handle.report
            self.num_descriptors = len(os.listdir("/proc/self/fd")) - fds
        self.disk_nbytes = sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize("name", ["state", "stepped"])
def test_state_takes_what_a_checkpointer_takes(module: str, name: str, run_dir: Path) -> None:
    need = plan("--module", f"{module}:{name}", "--set", "arena.buffers=3")
    real = Real(run_dir, call(module, name), buffers=3)
    rank = need["rank"]
    assert need["verdict"] == "fits"
    assert need["staging"]["arena_nbytes"] == need["wanted_arena_nbytes"] == 3 * rank["slab_nbytes"]
    assert real.arena_nbytes == pytest.approx(3 * rank["slab_nbytes"], abs=3 * 256)  # addresses differ from run to run
    assert real.report.nbytes == pytest.approx(rank["tensor_nbytes"] + rank["object_nbytes"], abs=256)
    assert (real.report.num_tensors, real.report.num_objects) == (rank["num_tensors"], rank["num_objects"])
    assert real.disk_nbytes == pytest.approx(need["state"]["disk_nbytes"], abs=256)
    assert real.num_descriptors <= need["num_descriptors"]
    assert need["assumed"] == []
    stored = plan(run_dir, "--set", "arena.buffers=3")  # the same once more, from its checkpoint
    assert stored["state"]["disk_nbytes"] == pytest.approx(real.disk_nbytes, abs=256)
    assert stored["wanted_arena_nbytes"] == pytest.approx(
        real.arena_nbytes, rel=0.05
    )  # overlapping views are apart there


@pytest.mark.parametrize("meta", [["--meta"], []])
@pytest.mark.parametrize("optimizer", ["adamw", "amsgrad", "sgd", "plain_sgd"])
def test_optimizer_is_counted_with_the_state_it_will_have(
    module: str, optimizer: str, meta: list[str], run_dir: Path
) -> None:
    need = plan("--module", f"{module}:{optimizer}", *meta)
    model, real_optimizer = call(module, optimizer)
    model(torch.arange(10)).sum().backward()
    real_optimizer.step()
    real = Measured({"model": model, "optimizer": real_optimizer}, load_config(None), num_workers=2).footprint
    rank = need["rank"]
    assert (rank["num_tensors"], rank["num_objects"]) == (real.num_tensors, real.num_objects)
    assert rank["tensor_nbytes"] == pytest.approx(real.tensor_nbytes, abs=64 * real.num_tensors)
    assert rank["disk_nbytes"] == pytest.approx(real.disk_nbytes, abs=256)
    assert "after its first step" in need["assumed"][0]


def test_module_alone_takes_the_optimizer_that_is_named(module: str) -> None:
    given = plan("--module", f"{module}:adamw")
    assumed = plan("--module", f"{module}:module", "--optimizer", "adamw")
    assert assumed["rank"] == given["rank"]
    assert any("two tensors like each parameter" in text for text in assumed["assumed"])
    alone = plan("--module", f"{module}:module")
    none = plan("--module", f"{module}:module", "--optimizer", "none")
    assert alone["rank"] == none["rank"]
    assert alone["assumed"] == ["no optimizer is counted; --optimizer adds one"]
    parameters = (64_000 + 128) * 4  # that require a gradient; tied ones once
    difference = assumed["rank"]["tensor_nbytes"] - alone["rank"]["tensor_nbytes"]
    assert 2 * parameters <= difference <= 2 * parameters + 64 * 9


def test_optimizer_that_is_not_known_is_said_to_be_missing(module: str) -> None:
    assert "optimizer (Rprop) has no state before its first step" in plan("--module", f"{module}:rprop")["assumed"][0]


def test_output_of_the_callable_goes_to_stderr(module: str) -> None:
    outcome = Outcome("plan", "--module", f"{module}:module")
    assert outcome.code == 0
    assert "this must not" not in outcome.out
    assert "this must not" in outcome.err


def test_meta_module_takes_no_memory(module: str) -> None:
    need = plan("--module", f"{module}:large", "--meta", "--optimizer", "adamw", "--memory", "4TiB")
    assert need["fits"]
    assert need["rank"]["tensor_nbytes"] == pytest.approx(12 * 10 * 60_000 * 60_001, rel=1e-6)


@pytest.mark.parametrize("where", ["run", "checkpoint"])
def test_checkpoint_is_planned_for_by_its_manifest(saved_run: Path, where: str) -> None:
    path = saved_run if where == "run" else saved_run / f"step-{STEPS[-1]:08}"
    need = plan(path)
    files = (saved_run / f"step-{STEPS[-1]:08}").iterdir()
    assert (need["state"]["num_tensors"], need["state"]["num_objects"]) == (4, 1)
    assert need["state"]["disk_nbytes"] == pytest.approx(sum(file.stat().st_size for file in files), abs=256)
    assert need["source"] == str(saved_run / f"step-{STEPS[-1]:08}")
    assert plan(saved_run, "--step", STEPS[0])["source"] == str(saved_run / f"step-{STEPS[0]:08}")


def test_plain_numbers() -> None:
    need = plan("--params", "1.5M", "--dtype", "bf16", "--optimizer", "adamw", "--tensors", "10")
    assert need["rank"]["num_tensors"] == 40
    assert 9_000_000 <= need["rank"]["tensor_nbytes"] <= 9_000_000 + 64 * 40
    assert plan("--params", 3)["rank"]["num_tensors"] == 3
    assert plan("--params", "2K", "--optimizer", "sgd")["rank"]["tensor_nbytes"] >= 16_000
    large = plan("--params", "70B", "--dtype", "bfloat16", "--optimizer", "adamw", "--memory", "2TiB")
    assert large["fits"]
    assert large["rank"]["tensor_nbytes"] >= 420_000_000_000


def test_shards_divide_what_a_rank_stages_and_not_what_is_on_disk(module: str) -> None:
    whole = plan("--module", f"{module}:scalars")
    need = plan("--module", f"{module}:scalars", "--shards", "4", "--local-world-size", "2")
    assert need["job"] == {"num_ranks": 4, "local_world_size": 2, "num_shards": 4}
    assert need["state"] == whole["state"] == whole["rank"]
    ours = 8 * 250 * 4 + 2 * 3 * 4 + 4  # rows of the first rank; a scalar is on every one
    assert ours <= need["rank"]["tensor_nbytes"] <= ours + 64 * 10
    per_rank = need["staging"]["arena_nbytes"] + need["worker_nbytes"]
    assert need["host_nbytes"] == 2 * per_rank
    assert need["num_workers"] >= 1


def test_ranks_that_have_copies_stage_a_part_each_unless_they_save_for_themselves() -> None:
    options = ("--params", "8M", "--tensors", "8", "--ranks", "4", "--local-world-size", "2")
    together = plan(*options)
    assert 8_000_000 <= together["rank"]["tensor_nbytes"] <= 8_000_000 + 4096
    assert together["state"]["tensor_nbytes"] >= 32_000_000
    apart = plan(*options, "--set", "ranks.together=false")
    assert apart["rank"] == apart["state"]


def test_replicas_take_two_buffers_of_each_rank() -> None:
    options = ("--params", "8M", "--tensors", "8", "--local-world-size", "2", "--ranks", "4")
    without, need = plan(*options), plan(*options, "--set", "replication.partners=1")
    assert without["replica_nbytes"] == 0
    share = need["rank"]["slab_nbytes"]
    assert 2 * share <= need["replica_nbytes"] <= 2 * (share + share // 64 + (1 << 20))
    assert need["host_nbytes"] == without["host_nbytes"] + 2 * need["replica_nbytes"]
    assert plan("--params", "8M", "--set", "replication.partners=1")["replica_nbytes"] == 0  # no partner


def test_ranks_of_a_host_share_its_memory_and_cores(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--module", f"{module}:scalars", "--memory", "64GiB", "--cores", 16)
    alone = plan(*options)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = plan(*options)
    assert alone["num_workers"] == 4
    assert (shared["num_workers"], shared["job"]["num_ranks"]) == (1, 4)
    assert alone["budget_nbytes"] == 4 * shared["budget_nbytes"] == 48 << 30


STATE_NBYTES = 100 * 40_000


@pytest.mark.parametrize(
    ("limit", "verdict", "in_flight", "advice"),
    [
        (2 * STATE_NBYTES + 200_000, "fits", 2, None),
        (STATE_NBYTES + 200_000, "fewer in flight", 1, "1 of 2 snapshots can be in flight"),
        (STATE_NBYTES // 2, "in pieces", 0, "save() copies and writes"),
        (100_000, "too large", 0, "save() will raise MemoryBudgetError"),
        (64 << 40, "not enough memory", 2, "allows more than the host has"),
    ],
)
def test_verdicts(limit: int, verdict: str, in_flight: int, advice: str | None) -> None:
    options = ["--params", "1M", "--tensors", "100", "--set", f"arena.max_host_bytes={limit}"]
    if verdict == "not enough memory":
        options += ["--memory", "100MiB"]
    outcome = Outcome("plan", *options, "--json")
    need = outcome.json
    assert (need["verdict"], need["staging"]["num_in_flight"]) == (verdict, in_flight)
    assert outcome.code == (0 if verdict == "fits" else 1)
    table = Outcome("plan", *options)
    assert table.code == outcome.code
    if advice is None:
        assert need["advice"] == []
        assert table.out.splitlines()[-1] == "it fits"
    else:
        assert advice in need["advice"][0]
        assert "it does not fit as configured: " in table.out
        assert all(text in table.out for text in need["advice"])
        assert f"for 2 whole snapshots, set arena.max_host_bytes to {need['wanted_arena_nbytes']}" in table.out


def test_following_the_advice_makes_it_fit() -> None:
    options = ["--params", "1M", "--memory", "1GiB", "--set"]
    need = plan(*options, "arena.max_host_bytes=2MB")
    assert not need["fits"]
    assert plan(*options, f"arena.max_host_bytes={need['wanted_arena_nbytes']}")["fits"]


def test_pieces_are_those_of_a_real_save(module: str, run_dir: Path) -> None:
    state = {"weights": {str(i): torch.zeros(100_000) for i in range(10)}}
    limit = 2 << 20
    real = Real(run_dir, state, max_host_bytes=limit)
    need = plan(run_dir, "--set", f"arena.max_host_bytes={limit}")
    pieces = need["staging"]["num_pieces"]
    assert need["verdict"] == "in pieces"
    assert need["staging"]["arena_nbytes"] == real.arena_nbytes <= limit
    assert any(f"staged in {pieces} pieces" in note for note in real.report.notes)


USAGE = {
    "nothing": ((), "give one of these, and one only: a checkpoint"),
    "two": (("dir", "--params", 5), "give one of these, and one only"),
    "meta": (("--params", 5, "--meta"), "--meta goes with --module only"),
    "step": (("--params", 5, "--step", 1), "--step goes with the directory of a run only"),
    "optimizer of a checkpoint": (("dir", "--optimizer", "sgd"), "a checkpoint already has the state"),
    "params": (("--params", "many"), "--params many is not a number of parameters; write it as"),
    "no params": (("--params", "0"), "--params 0 is not a number of parameters"),
    "infinite": (("--params", "infB"), "--params infB is not a number of parameters"),
    "dtype": (("--params", 5, "--dtype", "float31"), "--dtype float31: torch "),
    "memory": (("--params", 5, "--memory", "much"), "--memory much: "),
    "ranks": (("--params", 5, "--ranks", 6, "--shards", 4), "--ranks 6 is not a multiple of --shards 4"),
    "local": (("--params", 5, "--ranks", 2, "--local-world-size", 4), "--local-world-size 4 is more than --ranks 2"),
    "setting": (("--params", 5, "--set", "arena.bufers=3"), "arena.bufers: unknown key"),
    "unknown optimizer": (("--params", 5, "--optimizer", "lion"), "Invalid value for '--optimizer'"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage(arguments: tuple[object, ...], message: str) -> None:
    outcome = Outcome("plan", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


CALLABLES = {
    "no_such_package.module:make": "cannot import no_such_package.module: ModuleNotFoundError: No module named",
    "{module}": "must have the form package.module:callable",
    "{module}:": "must have the form package.module:callable",
    "{module}:missing": "has no missing",
    "{module}:Tied.missing": "has no Tied.missing",
    "{module}:number": "number has the type int and cannot be called",
    "{module}:fails": "it raised: ValueError: no such file (",
    "{module}:leaves": "it raised: SystemExit: 3 (",
    "{module}:nothing": "returned a int; it must return a state",
    "{module}:unstageable": "a['b']: a function cannot be pickled: ",
}


@pytest.mark.parametrize(("name", "message"), CALLABLES.items(), ids=CALLABLES)
def test_callable_that_does_not_do(module: str, name: str, message: str) -> None:
    outcome = Outcome("plan", "--module", name.format(module=module))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_place_of_an_error_in_the_callable_is_named(module: str, tmp_path: Path) -> None:
    line = MODULE.splitlines().index('    raise ValueError("no such file")') + 1
    assert f"({tmp_path / module}.py:{line})" in Outcome("plan", "--module", f"{module}:fails").err


@pytest.mark.parametrize("name", ["adamw", "scalars"])
def test_optimizer_that_cannot_be_assumed_is_wrong_usage(module: str, name: str) -> None:
    outcome = Outcome("plan", "--module", f"{module}:{name}", "--optimizer", "sgd")
    assert outcome.code == 2
    assert f"--optimizer sgd cannot be used, because {module}:{name} returned " in outcome.err


def test_no_checkpoint(tmp_path: Path) -> None:
    outcome = Outcome("plan", tmp_path)
    assert (outcome.code, outcome.out) == (1, "")
    assert "the directory has no committed checkpoint" in outcome.err
