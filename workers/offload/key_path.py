"""Where a value is in a nested state: ``optimizer.state[3]['exp_avg']``.

To carry the path along while copying would cost time for every value. So an error starts without a path, and each container
that it passes through on its way up adds its own segment.
"""

from __future__ import annotations

from dataclasses import dataclass

from stager.workers.errors import UnstageableError

ROOT = "state_dict"
_PLAIN_KEYS = (str, bytes, int, float, bool, complex, type(None))
_MAX_SEGMENTS = 24


@dataclass(frozen=True)
class Item:
    """``container[key]``."""

    key: object

    def __str__(self) -> str:
        return f"[{self.key!r}]" if isinstance(self.key, _PLAIN_KEYS) else f"[<{type(self.key).__name__}>]"


@dataclass(frozen=True)
class Attribute:
    """``object.name``."""

    name: str

    def __str__(self) -> str:
        return f".{self.name}"


@dataclass(frozen=True)
class Argument:
    """An argument with which an object has itself reconstructed (``__reduce_ex__``)."""

    index: int

    def __str__(self) -> str:
        return f".<argument {self.index}>"


Segment = Item | Attribute | Argument


class LocatedError(UnstageableError):
    """An :class:`UnstageableError` on its way up. ``segments`` runs from the outermost container inwards.

    It never leaves the engine's entry point, which turns it into a plain ``UnstageableError``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("", reason)
        self.segments: list[Segment] = []

    def prepend(self, segment: Segment) -> None:
        self.segments.insert(0, segment)

    def enter_object(self, has_slots: bool) -> None:
        """Turn a path into an object's pickled state into one that reads as that object's attributes."""
        if has_slots and self.segments:  # the state is (dict, dict of slots): drop the index into this tuple
            self.segments.pop(0)
        first = self.segments[0] if self.segments else None
        if isinstance(first, Item) and isinstance(first.key, str):
            self.segments[0] = Attribute(first.key)

    def resolve(self) -> UnstageableError:
        error = UnstageableError(format_path(self.segments), self.reason)
        error.__cause__ = self.__cause__
        return error


def format_path(segments: list[Segment]) -> str:
    """Write the path as Python would index it. A name as outermost key is written bare: ``model[0]``."""
    parts = [ROOT, *map(str, segments)]
    if segments and isinstance(segments[0], Item) and isinstance(segments[0].key, str):
        parts[:2] = [segments[0].key]
    if len(parts) > _MAX_SEGMENTS:
        half = _MAX_SEGMENTS // 2
        parts = [*parts[:half], "...", *parts[-half:]]
    return "".join(parts)
