"""Objects of one's own classes."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import torch

from tests.states.corpus.registry import Expect, state, values
from tests.states.corpus.tensors import rand


@dataclasses.dataclass
class Progress:
    step: int
    best: float
    weight: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    step: int
    note: str = ""


@dataclasses.dataclass(slots=True)
class Slotted:
    step: int
    weight: Any = None


class Point(NamedTuple):
    x: Any
    y: Any = 0


class Slots:
    __slots__ = ("a", "b")

    def __init__(self, a: Any) -> None:
        self.a = a


class SlotsAndDict(Slots):
    def __init__(self, a: Any) -> None:
        super().__init__(a)
        self.c = [a]


class Reduces:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return Reduces, (self.value,)


class ReducesEx(Reduces):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return ReducesEx, (self.value,), {"protocol": int(protocol) > 0}


class GetsState:
    def __init__(self, value: Any) -> None:
        self.value = value
        self.cache = object()

    def __getstate__(self) -> Any:
        return (self.value,)

    def __setstate__(self, state: Any) -> None:
        (self.value,) = state
        self.cache = None


class NewArguments:
    value: Any

    def __new__(cls, value: Any) -> NewArguments:
        made = super().__new__(cls)
        made.value = value
        return made

    def __getnewargs__(self) -> Any:
        return (self.value,)


class Config:
    """With no state_dict(), and a tensor inside."""

    def __init__(self) -> None:
        self.weight = rand(3)
        self.parent = self
        self.names = ["a"]


class OddNumber(int):
    """A subclass of a builtin, as HDF5's and yaml's values are."""


class OddFloat(float):
    __slots__ = ("unit",)


class OddList(list):
    """A list with a name."""


class OddTuple(tuple):
    __slots__ = ()


class OddSet(set):
    """A set of one's own."""


class Kind(enum.Enum):
    A = 1


class Flags(enum.Flag):
    A = enum.auto()
    B = enum.auto()


class Word(str, enum.Enum):
    A = "a"


class Outer:
    class Inner:
        def __init__(self, value: int = 3) -> None:
            self.value = value


class Changed:
    """Its code has changed since the save: what is stored does not fit any more."""

    def __init__(self) -> None:
        self.value = 3

    def __setstate__(self, state: Any) -> None:
        self.value = state["renamed"]


class Refuses:
    def __reduce__(self) -> Any:
        raise RuntimeError("this object is not to be saved")


class RefusesState:
    def __getstate__(self) -> Any:
        raise ValueError("no state")


class BrokenAttribute:
    """Any attribute that is asked for raises, as those of lazy proxies do."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"the object is not connected: {name}")


class Proxy:
    """It has every attribute, as mocks and remote proxies do: state_dict() among them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Proxy()


def _odd_float() -> OddFloat:
    made = OddFloat(1.5)
    made.unit = "m"
    return made


def _odd_list() -> OddList:
    made = OddList([1, rand(2)])
    vars(made)["name"] = "l"
    return made


def _local_class() -> Any:
    class Local:
        pass

    return Local()


values(
    "enums and dataclasses",
    {
        "enum": lambda: Kind.A,
        "enum-flag": lambda: Flags.A | Flags.B,
        "enum-str": lambda: Word.A,
        "dataclass": lambda: Progress(1, 0.5),
        "dataclass-with-tensor": lambda: Progress(1, 0.5, rand(3)),
        "dataclass-frozen": lambda: Frozen(1),
        "dataclass-slots": lambda: Slotted(1, rand(2)),
        "dataclass-in-list": lambda: [Frozen(1), rand(1)],
        "namedtuple": lambda: Point(1, "a"),
        "namedtuple-with-tensor": lambda: Point(rand(2), rand(3)),
        "namedtuple-in-list": lambda: [Point(rand(2)), 1],
    },
)
values(
    "objects",
    {
        "slots": lambda: Slots(rand(2)),
        "slots-and-dict": lambda: SlotsAndDict(3),
        "reduce": lambda: Reduces(rand(2)),
        "reduce-ex": lambda: ReducesEx(3),
        "getstate": lambda: GetsState(rand(2)),
        "getnewargs": lambda: NewArguments(3),
        "object-with-tensor-and-cycle": Config,
        "int-subclass": lambda: OddNumber(3),
        "float-subclass": _odd_float,
        "list-subclass": _odd_list,
        "list-subclass-without-tensor": lambda: OddList([1, 2]),
        "tuple-subclass": lambda: OddTuple((1, rand(2))),
        "set-subclass": lambda: OddSet({1, 2}),
        "nested-class": lambda: Outer.Inner(4),
        "module-as-object": lambda: (torch.nn.Linear(2, 2),),
        "return-type": lambda: torch.max(rand(3, 3), 0),
    },
)
values(
    "objects",
    {
        "local-class": _local_class,
        "reduce-raises": Refuses,
        "reduce-raises-in-list": lambda: [rand(1), {"a": Refuses()}],
        "getstate-raises": RefusesState,
    },
    expect=Expect.REFUSED,
)
values("objects", {"broken-attribute": BrokenAttribute}, expect=Expect.REFUSED)
values("objects", {"proxy": Proxy})
values(
    "objects",
    {"setstate-raises": Changed, "setstate-raises-in-list": lambda: [rand(1), Changed()]},
    expect=Expect.UNLOADABLE,
)


class Tracker:
    """Has state_dict() and load_state_dict()."""

    def __init__(self, fill: float = 0.0) -> None:
        self.mean = torch.full((3,), fill)
        self.history: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.history = state["mean"], state["history"]


class ListState(Tracker):
    """Its state is no mapping."""

    def state_dict(self) -> Any:
        return [self.mean, 3]

    def load_state_dict(self, state: Any) -> None:
        self.mean = state[0]


class ObjectState(Tracker):
    """Its state holds an object of a class."""

    def state_dict(self) -> dict[str, Any]:
        return {"progress": Frozen(3), "mean": self.mean}

    def load_state_dict(self, state: Any) -> None:
        self.mean = state["mean"]


class RaisingState(Tracker):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("state_dict() raised")


@state("stateful", "objects with state_dict", plain=lambda: {"x": Tracker(3.0).state_dict()})
def _stateful() -> dict[str, Any]:
    return {"x": Tracker(3.0)}


@state("stateful-in-list", "objects with state_dict", plain=lambda: {"x": [Tracker(3.0).state_dict(), 1]})
def _in_list() -> dict[str, Any]:
    return {"x": [Tracker(3.0), 1]}


@state("stateful-list-state", "objects with state_dict", plain=lambda: {"x": ListState(3.0).state_dict()})
def _list_state() -> dict[str, Any]:
    return {"x": ListState(3.0)}


@state("stateful-object-state", "objects with state_dict", plain=lambda: {"x": ObjectState(3.0).state_dict()})
def _object_state() -> dict[str, Any]:
    return {"x": ObjectState(3.0)}


@state("stateful-raises", "objects with state_dict", expect=Expect.REFUSED)
def _raising() -> dict[str, Any]:
    return {"a": {"x": RaisingState()}}
