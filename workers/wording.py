"""How messages list names."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any


def first_of(names: Collection[Any], most: int) -> str:
    """Write down the first ``most`` of some names, and how many more there are: ``a, b and 7 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, islice(names, most))) + more
