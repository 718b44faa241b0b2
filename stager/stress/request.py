"""What the conductor asks of the fork server: one JSON line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """Fork a child that does ``job`` (``jobs.py``), with its output in the file ``log``. Answered by the child's pid."""

    job: str
    log: str
    arguments: dict[str, Any]
