"""Where a value is in a nested state: ``optimizer.state[3]['exp_avg']``.

To carry the path along while copying would cost time for every value. So an error starts without a path, and each container
that it passes through on its way up adds its own segment.
"""

from __future__ import annotations

from typing import NamedTuple

from stager.workers.errors import UnstageableError

_ROOT = "state_dict"
_PLAIN_KEYS = (str, bytes, int, float, bool, complex, type(None))
_MAX_SEGMENTS = 24


class Segment(NamedTuple):
    """One step of a path, as Python would write it. ``name`` is the key, if the step is an item whose key is a string."""

    text: str
    name: str = ""


def at_item(key: object) -> Segment:
    text = f"[{key!r}]" if isinstance(key, _PLAIN_KEYS) else f"[<{type(key).__name__}>]"
    return Segment(text, key if isinstance(key, str) else "")


def at_attribute(name: str) -> Segment:
    return Segment(f".{name}")


def at_argument(index: int) -> Segment:
    """An argument with which an object has itself reconstructed (``__reduce_ex__``)."""
    return Segment(f".<argument {index}>")


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
        """Rewrite a path through the pickled state of an object, so that it names the object's attributes."""
        if has_slots and self.segments:  # the state is (dict, dict of slots): drop the index into this tuple
            self.segments.pop(0)
        if self.segments and self.segments[0].name:
            self.segments[0] = at_attribute(self.segments[0].name)

    def resolve(self) -> UnstageableError:
        error = UnstageableError(_format(self.segments), self.reason)
        error.__cause__ = self.__cause__
        return error


def _format(segments: list[Segment]) -> str:
    """Write the path as Python would index it. A name as outermost key is written bare: ``model[0]``."""
    parts = [_ROOT, *(segment.text for segment in segments)]
    if segments and segments[0].name:
        parts[:2] = [segments[0].name]
    if len(parts) > _MAX_SEGMENTS:
        half = _MAX_SEGMENTS // 2
        parts = [*parts[:half], "...", *parts[-half:]]
    return "".join(parts)
