"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(str, Enum):
    """OK: nothing to do. WARN: stager works, with a loss that ``meaning`` names. FAIL: it does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    Attributes:
        name: what was looked at.
        value: what was found, with its unit.
        status: see :class:`Status`.
        meaning: what that means for stager.
        advice: what to do; empty when there is nothing to do.
    """

    name: str
    value: str
    status: Status
    meaning: str
    advice: str = ""
