"""What is worked out once per plan, and by whom.

From save to save the tensors of a layout stay the same; only the objects behind them change their sizes. So everything that
depends on the tensors alone is worked out once, where it can be:

    1. trainer, when the structure of the state changes (``stager.state.snapshot_plan``): the layout plan, and the format's
       *templates*: bytes that only torch can make. Both go into the slab as one document.
    2. worker, at the first save of the plan: parses the document (``write_task.read_layout``). The plan gets one
       :class:`PlanCache`; every layout that is made of the plan shares it.
    3. worker, in later saves, by ``PlanCache.once_per_plan``: the manifest's rows, DCP's index, the header and tail of each
       small tensor. By ``PlanCache.until_changed``, what also depends on the objects' sizes: ends of spans, partition.

A save record holds no templates. After a crash another version of stager or torch may read the record, and bytes from a disk
must not get into the pickle that ``.metadata`` is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

Templates = Mapping[str, tuple[bytes, ...]]
"""Pieces of bytes by name. The format says what each is for (``formats/dcp.py``)."""


def templates_to_bytes(templates: Templates) -> bytes:
    """Serialise templates: ``{name: [length of each piece, ...]}`` as a line of JSON, then all pieces."""
    nbytes = {name: list(map(len, pieces)) for name, pieces in templates.items()}
    return b"\n".join((json.dumps(nbytes).encode(), b"".join(itertools.chain.from_iterable(templates.values()))))


def templates_from_bytes(data: bytes) -> Templates:
    """Return what :func:`templates_to_bytes` was given."""
    head, _, body = data.partition(b"\n")
    templates: dict[str, tuple[bytes, ...]] = {}
    position = 0
    for name, nbytes in json.loads(head).items():
        ends = list(itertools.accumulate(nbytes, initial=position))
        templates[name] = tuple(body[start:end] for start, end in itertools.pairwise(ends))
        position = ends[-1]
    return templates


class PlanCache:
    """Values that were worked out for a plan, by name.

    Attributes:
        num_fixed: the first so many items are the same in every layout that shares this cache: the tensors.
        templates: what the trainer made; None in a process that got the layout from elsewhere (a save record, a manifest).
    """

    __slots__ = ("_changing", "_fixed", "num_fixed", "templates")

    def __init__(self, num_fixed: int = 0, templates: Templates | None = None) -> None:
        self.num_fixed = num_fixed
        self.templates = templates
        self._fixed: dict[str, Any] = {}
        self._changing: dict[str, tuple[Any, Any]] = {}

    def once_per_plan(self, name: str, make: Callable[[], T]) -> T:
        """Return the value ``name``; ``make`` it at the first call. It may depend on fixed items and the structure only."""
        if name not in self._fixed:
            self._fixed[name] = make()
        value: T = self._fixed[name]
        return value

    def until_changed(self, name: str, key: Any, make: Callable[[], T]) -> T:
        """Return the value ``name``; ``make`` it again whenever ``key`` is another than at the last call."""
        known = self._changing.get(name)
        if known is None or known[0] != key:
            known = self._changing[name] = (key, make())
        value: T = known[1]
        return value
