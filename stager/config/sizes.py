"""Sizes as people write them: ``64MiB``, ``1.5GB``, ``75%``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "PIB": 2**50}

_SIZE = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)
_SHARE = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*%", re.ASCII)

SIZE_FORM = 'a size in bytes: an integer, or text such as "64MiB", "8GiB" or "1.5GB"'
SHARE_FORM = 'a share of the available memory such as "75%" (above 0%, at most 100%)'


@dataclass(frozen=True)
class Allowed:
    """Put into ``Annotated``: the words an error message uses for what a field accepts."""

    text: str


def parse_bytes(value: Any) -> int:
    """Read a number of bytes: an integer, or text with a unit (``KiB`` is 1024, ``KB`` is 1000; any case).

    Raises:
        ValueError: not a size, negative, or not a whole number of bytes.
    """
    nbytes = value if type(value) is int else _from_text(value)
    if nbytes < 0:
        raise ValueError(f"{value!r} is negative")
    return nbytes


def _from_text(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError("not a size")  # pydantic turns only ValueError into an error of the field
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size")
    number, factor = Decimal(match[1]), _UNITS.get(match[2].upper() or "B")
    if factor is None:
        raise ValueError(
            f"{match[2]!r} is not a unit of size; units are B, KB, MB, GB, TB, PB, KiB, MiB, GiB, TiB, PiB"
        )
    if factor == 1 and number != number.to_integral_value():
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return int(number * factor)


def parse_share(value: str) -> Decimal | None:
    """Read ``"75%"`` as 0.75; None if the text is no percentage.

    Raises:
        ValueError: the share is 0% or less, or more than 100%.
    """
    match = _SHARE.fullmatch(value.strip())
    if match is None:
        return None
    share = Decimal(match[1]) / 100
    if not 0 < share <= 1:
        raise ValueError(f"{value!r} is not above 0% and at most 100%")
    return share


def parse_memory_limit(value: Any) -> int | str:
    """Read a number of bytes, at least 1, or a share, which stays text (``"75%"``); ValueError for anything else."""
    if isinstance(value, str) and parse_share(value) is not None:
        return value.strip()
    nbytes = parse_bytes(value)
    if nbytes == 0:
        raise ValueError("a limit of 0 bytes leaves no room for any snapshot")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """``1.5 GiB``; whole bytes below 1 KiB."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    amount = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        if abs(amount) < 1023.95:  # what rounds to 1024.0 is one of the next unit
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} PiB"


Bytes = Annotated[int, BeforeValidator(parse_bytes), Allowed(SIZE_FORM)]
"""A number of bytes, 0 or more; written as an integer or as text with a unit."""

MemoryLimit = Annotated[int | str, BeforeValidator(parse_memory_limit), Allowed(f"{SIZE_FORM}; or {SHARE_FORM}")]
"""A number of bytes, or a share of the available memory as text (``"75%"``)."""
