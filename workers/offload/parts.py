"""What stands for a user's object, and for what a copy shares with its source, where the state dict is rebuilt in a worker.

NOTE [ A worker runs no code of the user's ]
A worker copies tensors, containers and plain values. It needs no class of the user's for that, and must not import one: its
module might start threads, open files or take a device. So an object travels as what its ``__reduce_ex__`` said, and comes
back as that: ``Parts``. Functions, classes and whatever else ``copy.deepcopy`` shares do not travel. A number stands for
each, ``SharedValue``. The trainer, which knows the numbers, makes the objects. Only a worker that writes a file
(``staged_copy/persisting.py``) makes them, too, because the file is made of them.
"""

from __future__ import annotations

from typing import Any


class SharedValue:
    """Stands for a value that the copy shares with the source. ``number`` is its place in ``PackedState.shared``."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> str:
        return "SharedValue"  # a name: copied as functions and classes are, by sharing it

    def __call__(self, *_: Any) -> None:
        """Never called. A pickle takes only what can be called for the function that makes an object."""
        raise NotImplementedError("the trainer has the function")


class Parts:
    """Stands for an object: what ``__reduce_ex__`` returned, two to six items, with its iterators as lists."""

    __slots__ = ("reduced",)

    reduced: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return Parts, (), self.reduced  # made empty first: its parts may refer to it

    def __setstate__(self, reduced: tuple[Any, ...]) -> None:
        self.reduced = reduced

    def as_reduced(self) -> tuple[Any, ...]:
        """Return what ``__reduce_ex__`` returns: six items."""
        function, args, state, items, pairs, setter = self.reduced
        return function, args, state, _iterator(items), _iterator(pairs), setter


def parts_of(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a pickle needs to make ``Parts`` of what an object's ``__reduce_ex__`` returned."""
    function, args, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
    return Parts, (), (function, args, state, _list(items), _list(pairs), setter)


def _list(items: Any) -> list[Any] | None:
    return None if items is None else list(items)


def _iterator(items: list[Any] | None) -> Any:
    return None if items is None else iter(items)
