"""One line of ``stager inspect``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One leaf of the state.

    Attributes:
        key: its path, joined by dots: the name DCP gives it.
        kind: "tensor" or "object".
        dtype, shape: of a tensor; "" and () for an object.
        nbytes: of its values (tensor) or its pickle (object); None where that is not known.
        file: in the checkpoint's directory.
        offset: in that file, of those bytes; None where that is not known.
        same_as: the key it shares its bytes with (tied), or None.
    """

    key: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    file: str
    offset: int | None = None
    same_as: str | None = None
