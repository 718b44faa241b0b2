"""Loading a part by the names of its keys: what is selected, what is left alone, what is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stager import Checkpointer, CorruptCheckpointError, StateMismatchError, UsageError, load_checkpoint
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from tests.persistence.tasks import save
from tests.states import same

STATE: dict[str, Any] = {
    "model": {"a": {"weight": torch.ones(2), "bias": torch.ones(3)}, "b": {"weight": torch.full((4,), 2.0)}},
    "list": [torch.zeros(1), {"weight": torch.ones(1)}],
    1: {"n": 5},
}


@pytest.fixture
def run(run_dir: Path) -> Path:
    save(run_dir, STATE, step=3)
    return run_dir


def load(run: Path, keys: Any, into: Any = None, strict: bool = True) -> Any:
    with Checkpointer(run, read_only=True) as ckpt:
        loaded = ckpt.load(into=into, strict=strict, keys=keys)
    assert loaded is not None
    return loaded.state


SELECTIONS: list[tuple[Any, Any]] = [
    ("*.weight", {"model": {"a": {"weight": torch.ones(2)}, "b": STATE["model"]["b"]}, "list": STATE["list"]}),
    ("model.a.*", {"model": {"a": STATE["model"]["a"]}}),
    (["1.n", "model.?.bias"], {"model": {"a": {"bias": torch.ones(3)}}, 1: {"n": 5}}),
    ("*", STATE),
]


@pytest.mark.parametrize("keys, expected", SELECTIONS, ids=str)
def test_new_state_has_what_is_selected(run: Path, tmp_path: Path, keys: Any, expected: Any) -> None:
    assert same(load(run, keys), expected)
    torch.save(STATE, tmp_path / "a.pt")
    assert same(load_checkpoint(tmp_path / "a.pt", keys=keys).state, expected)


@pytest.mark.parametrize(
    "keys, expected", [("l[1]", {"l[1]"}), ("[!a]", {"[!a]"}), ("l?1]", {"l[1]"}), ("l*", {"l[1]", "l1"})]
)
def test_brackets_are_literal(run_dir: Path, keys: str, expected: set[str]) -> None:
    save(run_dir, {"l[1]": 10, "l1": 20, "[!a]": 30, "b": 40})
    assert load(run_dir, keys).keys() == expected
    into = dict.fromkeys(["l[1]", "l1", "[!a]", "b"], 0)
    load(run_dir, keys, into)
    assert {name for name, value in into.items() if value} == expected


@pytest.mark.parametrize("into", [None, {"model": {}}], ids=["new", "into"])
@pytest.mark.parametrize("keys", ["weight", [], "Model.*"], ids=str)
def test_nothing_is_selected(run: Path, keys: Any, into: Any) -> None:
    with pytest.raises(StateMismatchError, match="no key matches"):
        load(run, keys, into)


def blank() -> dict[str, Any]:
    return {"model": {"a": {"weight": torch.zeros(2), "bias": torch.zeros(3)}, "b": {"weight": torch.zeros(4)}}, "x": 1}


@pytest.mark.parametrize("origin", ["stager", "torch.save"])
def test_what_is_not_selected_is_left_alone(run: Path, tmp_path: Path, origin: str) -> None:
    path = run / "step-00000003"
    if origin == "torch.save":
        path = tmp_path / "a.pt"
        torch.save(STATE, path)
    into = blank()
    bias = into["model"]["a"]["bias"]
    load_checkpoint(path, into, keys="model.*.weight")
    assert into["model"]["a"]["bias"] is bias and not bias.any() and into["x"] == 1
    assert into["model"]["a"]["weight"].all() and into["model"]["b"]["weight"].all()


def test_only_what_is_selected_is_missing_or_unexpected(run: Path) -> None:
    into = blank()
    into["model"]["a"]["other"] = torch.zeros(1)
    into["model"]["c"] = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
    del into["model"]["b"], into["model"]["a"]["bias"]
    with pytest.raises(StateMismatchError) as raised:
        load(run, "model.*.weight", into)
    assert str(raised.value).splitlines()[1:-1] == [
        "  model['c']['weight']: is in the target but not in the checkpoint",
        "  model['b']: is in the checkpoint but not in the target",
    ]
    assert not into["model"]["a"]["weight"].any()
    load(run, "model.*.weight", into, strict=False)
    assert into["model"]["a"]["weight"].all()


def test_module_in_part_and_optimizer_as_a_whole(run_dir: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save(run_dir, {"m": model, "o": optimizer}, step=1)
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = other[1].weight.clone()
    into = {"m": other, "o": torch.optim.AdamW(other.parameters())}
    load(run_dir, "m.0.*", into)
    assert torch.equal(other[0].weight, model[0].weight) and torch.equal(other[1].weight, before)
    assert not into["o"].state
    with pytest.raises(StateMismatchError, match="o: is a AdamW, which can be restored only whole"):
        load(run_dir, "*exp_avg", into)
    load(run_dir, ["m.0.*", "o.*"], into)
    assert len(into["o"].state) == 4
    with pytest.raises(StateMismatchError, match=r"m\['2.weight'\]: is in the target but not in the checkpoint"):
        load(run_dir, "m.?.*", {"m": nn.Sequential(*other, nn.Linear(1, 1))})


def test_damage_is_found_where_it_is_selected(run: Path) -> None:
    path = run / "step-00000003"
    item = read_manifest(path).layout.items[0]  # model.a.weight
    (file,) = path.glob("__0_0.distcp")
    fd = os.open(file, os.O_RDWR)
    os.pwrite(fd, b"\x55", item.data_offset)
    os.close(fd)
    assert load(run, "model.b.*")["model"]["b"]["weight"].all()
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        load_checkpoint(path, keys="model.a.*")


# -- names of what is above leaves ------------------------------------------------------------------------------------


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])


@pytest.mark.parametrize("keys", [["model", "epoch"], "model*", ("epoch", "model.*"), ["mod?l", "e*h"]], ids=str)
def test_a_name_means_all_that_is_in_it(run_dir: Path, keys: Any) -> None:
    model, optimizer, _ = trained()
    save(run_dir, {"model": model, "opt": optimizer, "epoch": 3})
    other, other_optimizer, _ = trained()
    into = {"model": other, "opt": other_optimizer, "epoch": 0}
    load(run_dir, keys, into)
    assert torch.equal(other.weight, model.weight) and (into["epoch"] == 3) == (keys != "model*")


def test_containers_without_leaves_are_kept(run_dir: Path) -> None:
    model, optimizer, scheduler = trained()
    state = {"sched": scheduler, "opt": optimizer, "empty": {"a": {}, "b": [], "c": {"d": {}}}, "model": model}
    save(run_dir, state)
    assert load(run_dir, ["empty", "sched"])["empty"] == state["empty"]
    assert load(run_dir, "empty.c.d") == {"empty": {"c": {"d": {}}}}
    other, other_optimizer, other_scheduler = trained()
    load(run_dir, ["sched", "opt"], {"sched": other_scheduler, "opt": other_optimizer, "model": other})
    assert same(other_optimizer.state_dict(), optimizer.state_dict())
    assert other_scheduler.state_dict() == scheduler.state_dict()


@pytest.mark.parametrize(
    "keys, near",
    [
        (["model", "modle"], "Similar names: model"),
        (["model", "epcoh"], "Similar names: epoch"),
        ("model.wieght", r"Similar names: model\.weight"),
        ("weight", r"keys='\*\.weight' would match"),
        (["epoch", "zzz"], "The names at the top are model, opt, epoch"),
    ],
    ids=str,
)
def test_each_pattern_has_to_match(run_dir: Path, keys: Any, near: str) -> None:
    model, optimizer, _ = trained()
    save(run_dir, {"model": model, "opt": optimizer, "epoch": 3})
    into = {"model": model, "epoch": 0}
    for target in (None, into):
        with pytest.raises(StateMismatchError, match=near):
            load(run_dir, keys, target)
    assert into["epoch"] == 0


def test_each_pattern_has_to_select_something_of_the_target(run_dir: Path) -> None:
    model, optimizer, _ = trained()
    save(run_dir, {"model": model, "opt": optimizer, "epoch": 3})
    into = {"epoch": 0}
    with pytest.raises(StateMismatchError, match=r"keys='model' selects model, which the target .* does not have"):
        load(run_dir, ["model", "epoch"], into)
    assert into["epoch"] == 0


def test_a_container_that_is_selected_becomes_what_was_saved(run_dir: Path) -> None:
    save(run_dir, {"log": [{"a": 1}], "stats": {"x": 1}, "n": 1})
    into = {"log": [{"a": 5}, {"b": 6}], "stats": {"x": 0, "y": 2}, "n": 0}
    load(run_dir, ["log", "stats"], into)
    assert into == {"log": [{"a": 1}], "stats": {"x": 1}, "n": 0}


def test_a_pattern_that_is_no_text(run_dir: Path) -> None:
    save(run_dir, {"n": 1})
    with pytest.raises(UsageError, match="keys= has 3, a int; each of them has to be a text"):
        load(run_dir, ["n", 3])


def test_a_part_with_a_prefix_that_only_the_target_has(run_dir: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, {"opt": optimizer, "model": model}).upload_completion.result()
        optimizer.param_groups[0]["lr"] = 7.0
        ckpt.load(into={"module.opt": optimizer}, keys="opt", strip_prefix="module.")
    assert optimizer.param_groups[0]["lr"] == 1e-3
