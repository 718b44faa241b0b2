"""Hostile states by seed: freed, shrunk, faked, wrapped and expanded storages, and objects whose own code is hostile."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stager import UnstageableError
from tests.states import DTYPES
from tests.states.corpus.wrappers import Silent, TwoTensors

Mutation = Callable[[random.Random, dict[str, Any]], Any]
_MUTATIONS: list[Mutation] = []


def mutation(make: Mutation) -> Mutation:
    """Register a function that makes a hostile value. It may also use, or spoil, what is in the state already."""
    _MUTATIONS.append(make)
    return make


def hostile_state(seed: int) -> tuple[dict[str, Any], list[str]]:
    """Make the state of a seed. Returns it, and the names of the mutations in it."""
    rng = random.Random(seed)
    state: dict[str, Any] = {f"w{i}": _tensor(rng) for i in range(rng.randrange(1, 5))}
    names = []
    for i in range(rng.randrange(1, 4)):
        make = rng.choice(_MUTATIONS)
        names.append(make.__name__.strip("_"))
        state[f"m{i}"] = _inside(rng, make(rng, state))
    entries = list(state.items())
    rng.shuffle(entries)
    return dict(entries), names


def _tensor(rng: random.Random) -> torch.Tensor:
    shape = [rng.choice([0, 1, 2, 3, 7, 64, 300]) for _ in range(rng.randrange(0, 3))]
    return torch.zeros(shape).to(rng.choice(DTYPES))


def _large(rng: random.Random) -> torch.Tensor:
    return torch.ones(rng.choice([10, 1000, 70_000, 1 << 20]))


def _inside(rng: random.Random, value: Any) -> Any:
    """The value, or the value within a container of some kind."""
    wraps: list[Callable[[Any], Any]] = [
        lambda v: v,
        lambda v: v,
        lambda v: [v, 1],
        lambda v: (v, 1),
        lambda v: {"k": v},
        lambda v: {(0, 1): v},
        lambda v: OrderedDict(k=[v]),
        lambda v: [[{"k": (v,)}]],
    ]
    return rng.choice(wraps)(value)


# -- memory -----------------------------------------------------------------------------------------------------------


@mutation
def _freed(rng: random.Random, state: dict[str, Any]) -> Any:
    value = _large(rng)
    value.untyped_storage().resize_(0)
    return value


@mutation
def _freed_neighbour(rng: random.Random, state: dict[str, Any]) -> Any:
    victim = state["w0"]
    if victim.untyped_storage().resizable():
        victim.untyped_storage().resize_(0)
    return 1


@mutation
def _shrunk(rng: random.Random, state: dict[str, Any]) -> Any:
    value = _large(rng)
    value.untyped_storage().resize_(rng.randrange(value.untyped_storage().nbytes()))
    return value


@mutation
def _grown(rng: random.Random, state: dict[str, Any]) -> Any:
    value = _large(rng)
    value.untyped_storage().resize_(value.untyped_storage().nbytes() * 2)
    return value


@mutation
def _freed_view(rng: random.Random, state: dict[str, Any]) -> Any:
    base = torch.ones(100, 100)
    view = rng.choice([base[10:], base[:, 3], base.t(), base[::2, ::3]])
    base.untyped_storage().resize_(rng.choice([0, 400, 39_996]))
    return view


@mutation
def _expanded(rng: random.Random, state: dict[str, Any]) -> Any:
    return torch.ones(1).expand(rng.choice([3, 1000]), rng.choice([1, 50]))


@mutation
def _strided(rng: random.Random, state: dict[str, Any]) -> Any:
    return torch.ones(100).as_strided((rng.randrange(5), 4), (rng.randrange(4), rng.randrange(9)), rng.randrange(9))


@mutation
def _lazy_view(rng: random.Random, state: dict[str, Any]) -> Any:
    value = torch.ones(1000, dtype=torch.complex64)
    view = rng.choice([value.conj(), value.conj().imag, torch._neg_view(value)])
    if rng.random() < 0.3:
        value.untyped_storage().resize_(0)
    return view


@mutation
def _sparse_freed(rng: random.Random, state: dict[str, Any]) -> Any:
    values, indices = torch.ones(100), torch.arange(100).reshape(1, -1)
    rng.choice([values, indices]).untyped_storage().resize_(0)
    return torch.sparse_coo_tensor(indices, values, (200,), check_invariants=False)


@mutation
def _data_swapped(rng: random.Random, state: dict[str, Any]) -> Any:
    value = torch.nn.Parameter(_large(rng))
    value.data = rng.choice([torch.empty(0), torch.ones(5)])
    return value


# -- tensors without values -------------------------------------------------------------------------------------------


@mutation
def _fake(rng: random.Random, state: dict[str, Any]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        value: Any = torch.empty(rng.choice([3, 10_000, 1 << 20]))
    return torch.nn.Parameter(value) if rng.random() < 0.3 else value


@mutation
def _meta(rng: random.Random, state: dict[str, Any]) -> Any:
    return torch.empty(3, device="meta")


@mutation
def _escaped(rng: random.Random, state: dict[str, Any]) -> Any:
    caught: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        caught.append(x)
        return x.sum()

    rng.choice([torch.vmap, torch.func.grad])(function)(torch.ones(5))
    return caught[0]


@mutation
def _functional(rng: random.Random, state: dict[str, Any]) -> Any:
    return torch._to_functional_tensor(torch.ones(5))


@mutation
def _wrapper(rng: random.Random, state: dict[str, Any]) -> Any:
    inner = [torch.ones(50, 3), torch.ones(50, 3)]
    made = rng.choice([lambda: TwoTensors(*inner), lambda: Silent(inner[0])])()
    if rng.random() < 0.5:
        inner[-1].untyped_storage().resize_(0)
    return made


@mutation
def _wrapper_of_fake(rng: random.Random, state: dict[str, Any]) -> Any:
    return TwoTensors(torch.ones(3), torch.empty(3, device="meta"))


@mutation
def _lying_subclass(rng: random.Random, state: dict[str, Any]) -> Any:
    return torch.ones(5).as_subclass(rng.choice([LyingAddress, LyingSize, RaisingFunction, LyingFlatten]))


class LyingAddress(torch.Tensor):
    def data_ptr(self) -> int:
        return 16


class LyingSize(torch.Tensor):
    def size(self, *_: Any) -> Any:
        return torch.Size([1 << 30])

    def untyped_storage(self) -> Any:
        raise RuntimeError("there is none")


class RaisingFunction(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError("not now")


class LyingFlatten(torch.Tensor):
    def __tensor_flatten__(self) -> Any:
        return ["missing", 3], None

    @staticmethod
    def __tensor_unflatten__(*_: Any) -> Any:
        return 3


# -- objects ----------------------------------------------------------------------------------------------------------


@mutation
def _hostile_reduce(rng: random.Random, state: dict[str, Any]) -> Any:
    victim = state["w0"]
    answers: list[Callable[[], Any]] = [
        lambda: 3,
        lambda: "no_such_global",
        lambda: (),
        lambda: (1, 2),
        lambda: (len, 3),
        lambda: (list, (), None, 7),
        lambda: (lambda: 1, ()),
        lambda: _raise(RuntimeError("not to be saved")),
        lambda: _raise(MemoryError()),
        lambda: _raise(RecursionError()),
        lambda: _raise(StopIteration()),
        lambda: _raise(AttributeError("state_dict")),
        lambda: _raise(AssertionError()),
        lambda: _raise(UnstageableError("their key", "their reason")),
        lambda: (int, (str(victim.set_(torch.empty(0)) is None)[:0] or 1,)),
        lambda: (int, (victim.untyped_storage().resize_(0) and 1,)),
        lambda: (Hostile, (Hostile(rng.choice(answers)),)),
        lambda: (Rebuilds, (rng.randrange(6),)),
    ]
    return Hostile(rng.choice(answers))


def _raise(error: BaseException) -> Any:
    raise error


class Hostile:
    """Its __reduce__ does what it was told to."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.answer()


class Rebuilds:
    """What raises when it is loaded."""

    def __init__(self, how: int) -> None:
        errors: list[BaseException] = [KeyError("k"), EOFError(), MemoryError(), OSError(5, "disk"), StopIteration()]
        if how < len(errors):
            raise errors[how]


@mutation
def _deep(rng: random.Random, state: dict[str, Any]) -> Any:
    value: Any = state["w0"] if rng.random() < 0.5 else 1
    wrap = rng.choice([lambda v: [v], lambda v: {"k": v}, lambda v: (v,), lambda v: [v, (v,)]])
    for _ in range(rng.choice([60, 150, 900]) if wrap([0]) != [[0], ([0],)] else 15):
        value = wrap(value)
    return value


@mutation
def _cycle(rng: random.Random, state: dict[str, Any]) -> Any:
    value: Any = rng.choice([[], {}])
    step = rng.choice([lambda v: v, lambda v: (v,), lambda v: [v], lambda v: {"k": v}])(value)
    if isinstance(value, list):
        value += [step, state["w0"]][: rng.randrange(1, 3)]
    else:
        value["k"] = step
    return value


@mutation
def _own_container(rng: random.Random, state: dict[str, Any]) -> Any:
    return rng.choice([Growing, Shuffling, Lying, ListOfNothing, Everything, Stateful])()


class Growing(dict):
    """Has one more entry each time that it is looked at."""

    def items(self) -> Any:
        self[f"k{len(self)}"] = torch.ones(2)
        return super().items()

    def values(self) -> Any:
        self[f"k{len(self)}"] = torch.ones(2)
        return super().values()


class Shuffling(dict):
    def __iter__(self) -> Iterator[Any]:
        return iter(["a", "b"])


class Lying(dict):
    def __len__(self) -> int:
        return 5

    def keys(self) -> Any:
        raise RuntimeError("no keys")


class ListOfNothing(list):
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no entries")

    def __len__(self) -> int:
        return 3


class Everything:
    """It has every attribute."""

    def __getattr__(self, name: str) -> Any:
        return Everything()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return Everything()


class Stateful:
    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> Any:
        self.calls += 1
        return [self, {"x": self}, None, {3: object}, _raise][self.calls % 5]

    def load_state_dict(self, state: Any) -> None:
        raise KeyError("the class has changed")


@mutation
def _hostile_key(rng: random.Random, state: dict[str, Any]) -> Any:
    return {
        rng.choice([NoText(), 1e400, float("nan"), "\ud800", "", b"\0", (1, "a"), 2**200, "a" * 70_000]): state["w0"]
    }


class NoText:
    def __repr__(self) -> str:
        raise RuntimeError("it has no text")

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("it is not to be compared")
