"""What was worked out for a plan, kept for its next save.

From save to save a layout's tensors stay the same; only the objects behind them change their sizes. What depends on the
tensors alone (rows of the manifest, most of DCP's index, the frames around small tensors) is made once in each worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from stager.workers.checkpoint.layout.templates import Templates

T = TypeVar("T")


class Memo:
    """Attributes:
    num_fixed: so many items of a layout, from the first on, are the same in every layout that shares this memo.
    templates: what the trainer worked out; None: nobody did.
    """

    __slots__ = ("_of_plan", "_of_save", "num_fixed", "templates")

    def __init__(self, num_fixed: int = 0, templates: Templates | None = None) -> None:
        self.num_fixed = num_fixed
        self.templates = templates
        self._of_plan: dict[str, Any] = {}
        self._of_save: dict[str, tuple[Any, Any]] = {}

    def of_plan(self, name: str, make: Callable[[], T]) -> T:
        """What depends on the fixed items and the structure only."""
        if name not in self._of_plan:
            self._of_plan[name] = make()
        value: T = self._of_plan[name]
        return value

    def of_save(self, name: str, key: Any, make: Callable[[], T]) -> T:
        """What depends on ``key`` as well: the last one is kept."""
        known = self._of_save.get(name)
        if known is None or known[0] != key:
            known = self._of_save[name] = (key, make())
        value: T = known[1]
        return value
