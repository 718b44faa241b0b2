"""Plain containers become what the checkpoint has; what belongs to somebody is never removed."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from stager import Checkpointer, Loaded, StateMismatchError
from stager.workers.checkpoint.formats import FORMATS
from tests.persistence.tasks import restorer, save
from tests.states import same

Point = namedtuple("Point", "x y")


class Meter:
    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


def load(run_dir: Path, into: Any, **options: Any) -> Loaded:
    with Checkpointer(run_dir, read_only=True) as ckpt:
        loaded = ckpt.load(into=into, **options)
    assert loaded is not None
    return loaded


PAIRS: dict[str, tuple[Any, Any]] = {
    "the issue's": ([{"loss": 0.5}], []),
    "longer list": ([{"loss": 0.5}, {"loss": 0.4}], [{"loss": 1.0}] * 4),
    "shorter list": ([{"a": [1]}, {"b": [2]}, {"c": [3]}], [{"a": [0]}]),
    "list of numbers": ([1, 2, 3], [4, 5, 6, 7, 8]),
    "many numbers": (list(range(1000)), list(range(2000))),
    "many entries": ([{"loss": i / 7, "ids": [i]} for i in range(300)], [{"loss": 0, "ids": []}] * 500),
    "keys that appeared since": ({"a": {"x": 1}}, {"a": {"x": 2, "y": 3}, "b": {"z": 4}}),
    "keys that are gone": ({"a": {"x": 1, 7: "seven"}, "b": {}}, {}),
    "empty at first": ({}, {"a": {"b": [1, {"c": 2}]}}),
    "empty list at first": ([], [{"a": 1}]),
    "nested": ({"runs": [{"log": [{"e": 1}]}, {"log": []}]}, {"runs": [{"log": [{"e": 9}, {"e": 8}]}]}),
    "None at first": (None, {"best": {"loss": 1}}),
    "a value at first": (0, {"best": 1}),
    "a list now": ({"a": 1}, [{"a": 1}]),
    "a mapping now": ([{"a": 1}], {"a": [1]}),
    "None now": ({"a": [{"b": 1}]}, None),
    "tuple": ((1, (2, "x")), (1, (3, "y"), 4)),
    "tuple for list": ((1, 2), [{"a": 1}]),
    "deque": (deque([1, 2], maxlen=4), deque([5], maxlen=4)),
    "another deque": (deque([1, 2], maxlen=4), deque([5], maxlen=9)),
    "set": ({1, 2}, {3}),
    "counter": (Counter("aab"), Counter("xyz")),
    "bytearray": (bytearray(b"ab"), bytearray(b"xyz")),
    "default dict": (defaultdict(list, {"a": [1]}), defaultdict(list, {"b": [2]})),
    "ordered": (OrderedDict(a=1, b=2), OrderedDict(b=2, c=3, a=0)),
    "other keys": ({(1, 2): "x", b"k": "y"}, {(1, 2): "z", (3, 4): "w"}),
    "tensors in a longer list": ([torch.ones(2)], [torch.zeros(2), torch.zeros(2)]),
    "tensors in a shorter list": ([torch.ones(2), torch.ones(3)], []),
    "tensors that appeared since": ({}, {"w": torch.zeros(2), "deep": [{"v": torch.zeros(1)}]}),
    "tensors that are gone": ({"w": torch.ones(2), "deep": [{"v": torch.ones(1)}]}, {}),
    "no tensor yet": ({"best": None, "w": torch.ones(1)}, {"best": torch.ones(2), "w": torch.zeros(1)}),
    "tensors not yet": (None, {"w": torch.zeros(2)}),
}


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_a_container_becomes_what_was_saved(run_dir: Path, name: str, strict: bool, kind: str) -> None:
    saved, here = PAIRS[name]
    here = copy.deepcopy(here)
    state = {"h": saved, "n": 1}
    info = save(run_dir, state, kind=kind)
    into = {"h": here, "n": 2}
    restorer(info).load_into(into, strict)
    assert same(into, state) and type(into["h"]) is type(saved)
    in_order = [list(value) for value in (into["h"], saved)] if isinstance(saved, dict) else [[], []]
    assert in_order[0] == in_order[1]
    keeps = type(saved) is type(here) and isinstance(saved, (dict, list, set, bytearray, deque))
    if keeps and name not in ("another deque",):
        assert into["h"] is here


def test_rolling_back_in_one_process_gives_the_earlier_state(run_dir: Path) -> None:
    """Steps 1 and 2, then 1 again, then 2 again: what grew shrinks, and grows again."""
    model = nn.Linear(2, 2)
    state: dict[str, Any] = {
        "model": model,
        "log": [],
        "ema": {},
        "best": None,
        "meters": {"loss": Meter(0.5)},
        "epoch": 1,
    }
    log, ema, weight = state["log"], state["ema"], model.weight
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, state).upload_completion.result()
        first = copy.deepcopy(state)
        log += [{"loss": 0.5, "at": (1, 2)}, {"loss": 0.4, "at": (3, 4)}]
        ema["weight"] = torch.ones(2, 2)
        state["best"] = {"loss": 0.4, "weight": torch.full((2, 2), 3.0)}
        state["meters"]["loss"].value, state["epoch"] = 0.25, 2
        with torch.no_grad():
            weight += 1
        ckpt.save(2, state).upload_completion.result()
        second = copy.deepcopy(state)
        for step, expected in ((1, first), (2, second), (1, first)):
            loaded = ckpt.load(step, into=state)
            gone = {"ema.weight"} if step == 1 else set()
            assert loaded is not None and set(loaded.missing) == gone and not loaded.unexpected
            for name in ("log", "ema", "best", "epoch"):
                assert same(state[name], expected[name])
            assert state["meters"]["loss"].value == expected["meters"]["loss"].value
            assert torch.equal(model.weight, expected["model"].weight)
            assert state["log"] is log and state["ema"] is ema and model.weight is weight


def test_tensors_of_the_same_place_are_filled_and_others_are_named(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(run_dir, {"ema": {"a": torch.ones(2), "c": torch.ones(1)}, "l": [torch.ones(1)]})
    a = torch.zeros(2)
    into = {"ema": {"b": torch.zeros(3), "a": a}, "l": [torch.zeros(1), torch.zeros(5)]}
    loaded = load(run_dir, into)
    assert same(into, {"ema": {"a": torch.ones(2), "c": torch.ones(1)}, "l": [torch.ones(1)]}) and into["ema"]["a"] is a
    assert loaded.missing == ("ema.b", "l.1") and loaded.unexpected == () and loaded.replaced == ()
    assert "were removed from their containers: ema['b'], l[1]" in caplog.text


def test_tensors_in_tuples_are_filled(run_dir: Path) -> None:
    state = {"p": Point(torch.ones(2), [torch.ones(1), 5]), "t": (torch.ones(3), 7), "same": (torch.ones(1),)}
    save(run_dir, state)
    x, y, t = torch.zeros(2), torch.zeros(1), torch.zeros(3)
    one = (torch.zeros(1),)
    into = {"p": Point(x, [y, 4]), "t": (t, 0, 1), "same": one}
    load(run_dir, into, allow_pickle=True)
    assert same(into["p"], state["p"]) and same(into["t"], state["t"])
    assert into["p"].x is x and into["p"].y[0] is y and into["t"][0] is t and into["same"] is one
    assert type(into["p"]) is Point and x.all() and y.all() and t.all() and one[0].all()


def test_one_list_in_two_places_takes_two_values(run_dir: Path) -> None:
    save(run_dir, {"a": [{"n": 1}], "b": [{"n": 2}, {"n": 3}], "c": {"x": {"y": 1}}, "d": {"x": {"y": 2}}})
    shared: list[Any] = [{"n": 0}]
    both: dict[str, Any] = {"x": {}}
    into = {"a": shared, "b": shared, "c": both, "d": both}
    load(run_dir, into)
    assert into == {"a": [{"n": 1}], "b": [{"n": 2}, {"n": 3}], "c": {"x": {"y": 1}}, "d": {"x": {"y": 2}}}


def test_a_shape_that_differs_needs_strict_false(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(run_dir, {"buffer": {"x": torch.ones(5), "y": torch.ones(2)}})
    x, y = torch.zeros(3), torch.zeros(2)
    into = {"buffer": {"x": x, "y": y}}
    with pytest.raises(StateMismatchError, match=r"buffer\['x'\]: has shape \[3\] .* strict=False puts"):
        load(run_dir, into)
    assert not y.any()
    loaded = load(run_dir, into, strict=False)
    assert loaded.replaced == ("buffer.x",) and into["buffer"]["y"] is y and y.all() and not x.any()
    assert torch.equal(into["buffer"]["x"], torch.ones(5)) and "took their place: buffer['x']" in caplog.text


OWNED: dict[str, Callable[[], Any]] = {
    "object": Meter,
    "module": lambda: nn.Linear(1, 1),
    "parameter": lambda: nn.Parameter(torch.zeros(1)),
    "state dict": lambda: nn.Linear(1, 1).state_dict(),
}


@pytest.mark.parametrize("owned", OWNED)
@pytest.mark.parametrize("place", ["mapping", "list"])
def test_what_belongs_to_somebody_is_not_removed(run_dir: Path, owned: str, place: str) -> None:
    container: Any = {"a": 1} if place == "mapping" else [{"a": 1}]
    save(run_dir, {"c": container, "n": 1})
    value = OWNED[owned]()
    into: Any = {"c": {"a": 2, "mine": value} if place == "mapping" else [{"a": 2}, value], "n": 0}
    name = "c['mine']" if place == "mapping" else "c[1]"
    with pytest.raises(StateMismatchError) as raised:
        load(run_dir, into)
    assert f"{name}: is in the target but not in the checkpoint" in str(raised.value) and into["n"] == 0
    loaded = load(run_dir, into, strict=False)
    assert loaded.missing == ("c.mine" if place == "mapping" else "c.1",)
    assert into["c"]["mine" if place == "mapping" else 1] is value
    assert (into["c"]["a"] if place == "mapping" else into["c"][0]["a"]) == 1


def test_a_state_without_an_object_to_take_it_is_unexpected(run_dir: Path) -> None:
    save(run_dir, {"l": [Meter(1), Meter(2)], "d": {"a": Meter(3), "b": Meter(4)}})
    into = {"l": [Meter()], "d": {"a": Meter()}}
    with pytest.raises(StateMismatchError, match=r"l\[1\]: is in the checkpoint but not in the target"):
        load(run_dir, into)
    loaded = load(run_dir, into, strict=False)
    assert loaded.unexpected == ("l.1", "d.b") and len(into["l"]) == len(into["d"]) == 1
    assert into["l"][0].value == 1 and into["d"]["a"].value == 3  # type: ignore[index]  # of two kinds


def test_a_state_dict_of_a_module_is_matched_as_the_module(run_dir: Path) -> None:
    larger = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2))
    save(run_dir, {"m": larger.state_dict(), "plain": dict(larger.state_dict())})
    for name, here in (("m", model.state_dict()), ("plain", {"0.weight": torch.zeros(2, 2), "9.x": torch.zeros(1)})):
        with pytest.raises(StateMismatchError, match="is in the target but not in the checkpoint"):
            load(run_dir, {name: here})
    here = {"0.weight": torch.zeros(2, 2), "9.x": torch.zeros(1)}
    loaded = load(run_dir, {"plain": here}, strict=False)
    assert set(here) == {"0.weight", "9.x"} and torch.equal(here["0.weight"], larger[0].weight)
    assert loaded.missing == ("plain.9.x",) and "plain.1.weight" in loaded.unexpected


# -- containers that cannot be changed ------------------------------------------------------------------------------


class ReadOnlyError(Exception):
    pass


class Config(dict[str, Any]):
    """As omegaconf's: it raises its own error when it is read-only."""

    is_read_only = True
    _metadata = MappingProxyType({"flags": "what omegaconf keeps under this name"})

    def __setitem__(self, key: str, value: Any) -> None:
        if self.is_read_only:
            raise ReadOnlyError(f"config is read-only; cannot set {key}")
        super().__setitem__(key, value)


def config(**values: Any) -> Config:
    made = Config()
    dict.update(made, values)
    return made


class Sizes(UserList[int]):
    """As omegaconf's lists: no list, and equal to one."""


READ_ONLY: list[Callable[..., Any]] = [config, lambda **values: MappingProxyType(values)]


@pytest.mark.parametrize("make", READ_ONLY, ids=["config", "proxy"])
def test_a_read_only_mapping_that_is_what_was_saved_is_left_alone(run_dir: Path, make: Any) -> None:
    save(run_dir, {"cfg": {"lr": 0.1, "sizes": [1, 2], "w": torch.ones(2)}, "n": 1})
    tensor = torch.zeros(2)
    into = {"cfg": make(lr=0.1, sizes=Sizes([1, 2]), w=tensor), "n": 0}
    load(run_dir, into)
    assert into["n"] == 1 and tensor.all()


@pytest.mark.parametrize("make", READ_ONLY, ids=["config", "proxy"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_read_only_mapping_that_differs_is_named_before_anything_is_changed(
    run_dir: Path, make: Any, strict: bool
) -> None:
    save(run_dir, {"w": torch.ones(2), "cfg": {"lr": 0.1, "w": torch.ones(1)}, "n": 1})
    tensor, here = torch.zeros(2), make(lr=0.2, w=torch.zeros(1))
    into = {"w": tensor, "cfg": here, "n": 0}
    with pytest.raises(StateMismatchError, match=r"cfg\['lr'\]: differs from the checkpoint, and is in a") as raised:
        load(run_dir, into, strict=strict)
    assert isinstance(raised.value.__cause__, (ReadOnlyError, TypeError))
    assert not tensor.any() and into["n"] == 0 and here["lr"] == 0.2


def test_a_config_that_can_be_changed_is_changed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "is_read_only", False)
    save(run_dir, {"cfg": {"lr": 0.1, "w": torch.ones(1), "new": [1]}})
    here = config(lr=0.2, w=torch.zeros(1), old=3)
    load(run_dir, {"cfg": here})
    assert dict(here) == {"lr": 0.1, "w": here["w"], "new": [1]} and here["w"].all()


class Unset(dict[str, Any]):
    """As omegaconf's: a value that was never set raises when it is read."""

    def __getitem__(self, key: str) -> Any:
        if super().__getitem__(key) == "???":
            raise ReadOnlyError(f"missing mandatory value: {key}")
        return super().__getitem__(key)

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        return [self[key] for key in self]


def test_a_value_that_cannot_be_read_is_named(run_dir: Path) -> None:
    save(run_dir, {"w": torch.ones(1), "cfg": {"lr": 0.1, "n": 1}})
    into = {"w": torch.zeros(1), "cfg": Unset(lr="???", n=0)}
    with pytest.raises(StateMismatchError, match=r"cfg\['lr'\]: cannot be read in the target \(ReadOnlyError: missing"):
        load(run_dir, into)
    assert not into["w"].any()  # type: ignore[union-attr]  # a tensor


# -- None for an object, and the reverse ----------------------------------------------------------------------------


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)


@pytest.mark.parametrize("make", [Meter, optimizer, lambda: nn.Linear(1, 1)], ids=["object", "optimizer", "module"])
def test_none_was_saved_for_what_is_now_an_object(run_dir: Path, make: Any) -> None:
    save(run_dir, {"w": torch.ones(1), "o": None, "n": 1})
    value, tensor = make(), torch.zeros(1)
    into = {"w": tensor, "o": value, "n": 0}
    with pytest.raises(StateMismatchError, match=r"o: is a \w+ in the target and None in the checkpoint"):
        load(run_dir, into)
    assert not tensor.any() and into["n"] == 0
    loaded = load(run_dir, into, strict=False)
    assert loaded.missing == ("o",) and into["o"] is value and tensor.all() and into["n"] == 1


class Stateless:
    """Its state is None, and it is told so."""

    told: Any = "nothing"

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: Any) -> None:
        self.told = state


def test_an_object_whose_state_is_none_gets_it(run_dir: Path) -> None:
    save(run_dir, {"o": Stateless()})
    into = {"o": Stateless()}
    load(run_dir, into)
    assert into["o"].told is None


@pytest.mark.parametrize("make", [optimizer, lambda: nn.Linear(1, 1)], ids=["optimizer", "module"])
def test_an_object_was_saved_for_what_is_now_none(run_dir: Path, make: Any) -> None:
    save(run_dir, {"w": torch.ones(1), "o": make()})
    into = {"w": torch.zeros(1), "o": None}
    with pytest.raises(
        StateMismatchError, match="o: is None in the target, and the checkpoint has the state of an object"
    ):
        load(run_dir, into)
    assert not into["w"].any()  # type: ignore[union-attr]  # a tensor
    assert load(run_dir, into, strict=False).unexpected == ("o",) and into["o"] is None


def test_nothing_is_logged_when_everything_fits(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(run_dir, {"log": [{"a": 1}], "w": {"t": torch.ones(1)}})
    with caplog.at_level(logging.WARNING):
        loaded = load(run_dir, {"log": [], "w": {"t": torch.zeros(1)}})
    assert not caplog.records
    assert (loaded.missing, loaded.unexpected, loaded.replaced, dict(loaded.per_rank)) == ((), (), (), {})
