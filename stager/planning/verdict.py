"""How a save of the state would go."""

from __future__ import annotations

from enum import Enum


class Verdict(str, Enum):
    FITS = "fits"  # as configured
    FEWER = "fewer in flight"  # than arena.buffers
    PIECES = "in pieces"  # no whole snapshot fits the budget
    TOO_LARGE = "too large"  # not even in pieces
    NO_MEMORY = "not enough memory"  # the budget allows it, the host does not have it
