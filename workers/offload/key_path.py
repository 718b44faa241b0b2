"""Where in a nested state something is: ``optimizer.state[3]['exp_avg']``.

The path is not carried along while copying, which would cost every element. An error starts without one and each
container it passes through on its way up adds its own segment.
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
    """An argument that an object gives for its own reconstruction (``__reduce_ex__``)."""

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
        """The path so far leads into an object's pickled state; make it read as that object's attributes."""
        if has_slots and self.segments:  # state is (dict, dict of slots)
            self.segments.pop(0)
        first = self.segments[0] if self.segments else None
        if isinstance(first, Item) and isinstance(first.key, str):
            self.segments[0] = Attribute(first.key)

    def __str__(self) -> str:
        return f"{format_path(self.segments)}: {self.reason}"

    def resolve(self) -> UnstageableError:
        error = UnstageableError(format_path(self.segments), self.reason)
        error.__cause__ = self.__cause__
        return error


def format_path(segments: list[Segment]) -> str:
    """The outermost key is written bare, as the name it is; the rest as Python would index it."""
    if not segments:
        return ROOT
    first = segments[0]
    bare = isinstance(first, Item) and isinstance(first.key, str)
    parts = [str(first.key) if isinstance(first, Item) and bare else f"{ROOT}{first}"]
    parts += [str(segment) for segment in segments[1:]]
    if len(parts) > _MAX_SEGMENTS:
        half = _MAX_SEGMENTS // 2
        parts = [*parts[:half], "...", *parts[-half:]]
    return "".join(parts)
