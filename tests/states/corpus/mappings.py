"""Mappings: their classes and their keys."""

from __future__ import annotations

from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict
from enum import Enum, IntEnum
from typing import Any

import torch

from tests.states.corpus.registry import state, values
from tests.states.corpus.tensors import rand


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Level(IntEnum):
    LOW = 1


class Text(str):
    """A key that is almost a str, as numpy's and yaml loaders' are."""

    __slots__ = ()


values(
    "keys",
    {
        "keys-int": lambda: {0: rand(2), 7: {"x": 1}, -1: 2},
        "keys-tuple": lambda: {(0, 0): rand(2), (0, 1): rand(2, seed=1)},
        "keys-tuple-without-tensor": lambda: {(0, 0): 1, (0, "a"): 2},
        "keys-bytes": lambda: {b"a": rand(2), b"\xff": 1},
        "keys-none-bool-float": lambda: {None: 1, True: 2, 0.5: rand(1), "s": 3},
        "keys-float-odd": lambda: {float("inf"): 1, -0.0: rand(1)},
        "keys-nan": lambda: {float("nan"): rand(1)},
        "keys-complex": lambda: {1j: rand(1)},
        "keys-frozenset": lambda: {frozenset({1, 2}): rand(1)},
        "keys-device": lambda: {torch.device("cpu"): rand(1)},
        "keys-dtype": lambda: {torch.float32: rand(1)},
        "keys-size": lambda: {torch.Size([2, 3]): rand(1)},
        "keys-big-int": lambda: {2**70: rand(1)},
        "keys-empty-string": lambda: {"": rand(1), "a": {"": 1}},
        "keys-dots": lambda: {"a.b": rand(1), "a..b": 2, ".": 3},
        "keys-slashes": lambda: {"../../etc": rand(1), "a/b": 2, "\\": 3},
        "keys-unicode": lambda: {"grüße": rand(1), "\0": 1, "日本": 2, "é": 3, "\u0301e": 4},
        "keys-surrogate": lambda: {"\ud800": rand(1)},
        "keys-long": lambda: {"k" * 10_000: rand(1)},
        "keys-order": lambda: {"z": rand(1), "a": 1, "m": rand(1)},
        "keys-tensors": lambda: {"weight": {rand(2): 1}},
    },
)
values(
    "keys",
    {
        "keys-enum": lambda: {Colour.RED: rand(1), Colour.GREEN: 2},
        "keys-int-enum": lambda: {Level.LOW: rand(1)},
        "keys-str-subclass": lambda: {Text("a"): rand(1)},
        "keys-class": lambda: {Counter: rand(1), torch.nn.Linear: 2},
    },
)
values(
    "key collisions",
    {
        "collide-int-and-str": lambda: {1: rand(1), "1": rand(1, seed=1)},
        "collide-list-and-str": lambda: {"l": [rand(1)], "l.0": rand(1, seed=1)},
        "collide-bool-and-str": lambda: {True: rand(1), "True": rand(1, seed=1)},
        "collide-none-and-str": lambda: {None: rand(1), "None": rand(1, seed=1)},
        "collide-dots": lambda: {"a.b": rand(1), "a": {"b": rand(1, seed=1)}},
        "collide-dots-deep": lambda: {"a": {"b.c": rand(1)}, "a.b": {"c": rand(1, seed=1)}},
        "collide-bool-and-int": lambda: {"a": {True: rand(1)}, "b": {1: rand(1)}, "c": {1.0: rand(1)}},
        "collide-float-and-str": lambda: {0.5: rand(1), "0.5": rand(1, seed=1)},
        "collide-case": lambda: {"A": rand(1), "a": rand(1, seed=1)},
        "collide-metadata": lambda: {"__metadata__": rand(1), "format": 2},
        "collide-object-file": lambda: {"__0_0.distcp": rand(1), "manifest.json": 3, ".metadata": 4},
    },
)


@state("collide-dots-at-the-top", "key collisions")
def _top() -> dict[str, Any]:
    return {"a.b": rand(1), "a": {"b": rand(1, seed=1)}}


class Settings(dict):
    """A dict with attributes, as transformers' and easydict's."""


class StatefulDict(dict):
    """A dict that gives another state than its items, as some trackers of metrics do."""

    def state_dict(self) -> dict[str, Any]:
        return {"items": dict(self), "version": 2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        self.update(state["items"])


class LoudMapping(UserDict):
    """Not a dict, and a Mapping."""


class PlainOrdered(OrderedDict):
    """As a model zoo's class of outputs."""


class CheckedDefault(defaultdict):
    """A defaultdict of one's own."""


def _settings_with_attribute() -> Settings:
    made = Settings(a=1, w=rand(2))
    vars(made)["name"] = "run"
    return made


def _ordered_with_attribute() -> OrderedDict[str, Any]:
    made = OrderedDict(w=rand(2))
    vars(made)["note"] = ("kept", 1)
    return made


def _ordered_with_metadata() -> OrderedDict[str, Any]:
    made = OrderedDict(w=rand(2))
    vars(made)["_metadata"] = OrderedDict({"": {"version": 1}, "layer": {"version": 2, "extra": (1, 2)}})
    return made


values(
    "mappings",
    {
        "ordered-dict": lambda: OrderedDict(z=rand(2), a=1),
        "ordered-dict-metadata": _ordered_with_metadata,
        "ordered-dict-attribute": _ordered_with_attribute,
        "defaultdict-list": lambda: defaultdict(list, a=[rand(1)], b=[]),
        "defaultdict-none": lambda: defaultdict(None, a=rand(1)),
        "counter": lambda: Counter("hello"),
        "empty-dict": lambda: {},
        "empty-ordered-dict": OrderedDict,
        "empty-in-list": lambda: [{}, [], (), OrderedDict()],
        "module-dict-state": lambda: torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}).state_dict(),
    },
)
values(
    "mappings",
    {
        "dict-subclass": lambda: Settings(a=1, w=rand(2)),
        "dict-subclass-attribute": _settings_with_attribute,
        "dict-subclass-in-list": lambda: [Settings(a=1), rand(1)],
        "ordered-subclass": lambda: PlainOrdered(a=rand(1)),
        "defaultdict-subclass": lambda: CheckedDefault(int, a=1),
        "user-dict": lambda: UserDict(a=rand(1)),
        "user-dict-subclass": lambda: LoudMapping(a=rand(1)),
        "chain-map": lambda: ChainMap({"a": rand(1)}, {"b": 2}),
        "parameter-dict": lambda: torch.nn.ParameterDict({"a": rand(2)}).state_dict(),
    },
)


@state("dict-with-own-state-dict", "mappings", plain=lambda: {"x": {"items": {"w": rand(2)}, "version": 2}})
def _stateful_dict() -> dict[str, Any]:
    return {"x": StatefulDict(w=rand(2))}
