"""A corpus state: what a training program may hold, and what saving it has to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

Build = Callable[[], dict[str, Any]]


class Expect(Enum):
    """What has to happen to a state.

    EQUAL: it comes back as ``torch.load(torch.save(state))`` gives it.
    REFUSED: ``save()`` raises UnstageableError with the key path, before anything is copied.
    UNLOADABLE: ``save()`` takes it; ``load()`` raises an error with the original one as its cause, and never None.
    """

    EQUAL = "equal"
    REFUSED = "refused"
    UNLOADABLE = "unloadable"


@dataclass(frozen=True)
class State:
    """One state of the corpus.

    Attributes:
        name: unique; words and dashes.
        kind: where such states come from.
        build: makes the state, a new one at each call.
        expect: what has to happen to it.
        plain: makes what ``torch.save`` is given instead, if the state has objects with ``state_dict()``.
        around: entered for the save and for the load: a setting of torch's.
        world: entered before the state is made, and left when all is done.
        by_default: it is plainly data: load() takes it without allow_pickle, although torch's weights_only rules refuse it.
        is_dangerous: it may end the process, so it is tried in a process of its own.
        needs: packages without which the state cannot be made.
    """

    name: str
    kind: str
    build: Build
    expect: Expect = Expect.EQUAL
    plain: Build | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    world: Callable[[], AbstractContextManager[Any]] = nullcontext
    by_default: bool = False
    is_dangerous: bool = False
    needs: tuple[str, ...] = ()


_STATES: dict[str, State] = {}


def _seeded(build: Build) -> Build:
    """Let ``build`` give the same values at each call."""

    def build_seeded() -> dict[str, Any]:
        torch.manual_seed(0)
        return build()

    return build_seeded


def state(name: str, kind: str, **properties: Any) -> Callable[[Build], Build]:
    """Register the decorated function: it builds the state ``name``."""

    def register(build: Build) -> Build:
        assert name not in _STATES, f"two states are called {name}"
        plain = properties.pop("plain", None)
        _STATES[name] = State(name, kind, _seeded(build), plain=plain and _seeded(plain), **properties)
        return build

    return register


def values(kind: str, makers: dict[str, Callable[[], Any]], **properties: Any) -> None:
    """Register one state for each maker: a mapping that holds one value."""

    def holding(make: Callable[[], Any]) -> Build:
        return lambda: {"x": make()}

    for name, make in makers.items():
        state(name, kind, **properties)(holding(make))


def registered() -> Iterator[State]:
    """All registered states, in order."""
    return iter(_STATES.values())
