"""Sealed JSON documents: any changed byte is noticed.

    {"xxh3_128":"<32 hex digits>","body":<the body, compact JSON>}\\n

The hash covers the body's bytes as they are in the file, and the bytes around them are compared literally. So no byte can
change unnoticed. Other readers see plain JSON.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from stager.workers.errors import CorruptCheckpointError

_HEAD = b'{"xxh3_128":"'
_MIDDLE = b'","body":'
_END = b"}\n"
_BODY_START = len(_HEAD) + 32 + len(_MIDDLE)


def seal(body: Any) -> bytes:
    """Serialise ``body`` into a sealed document."""
    return seal_json(json.dumps(body, separators=(",", ":"), allow_nan=False).encode())


def seal_json(data: bytes) -> bytes:
    """Seal a body that is JSON already."""
    return b"".join((_HEAD, xxhash.xxh3_128_hexdigest(data).encode(), _MIDDLE, data, _END))


def is_sealed(data: bytes) -> bool:
    """Return whether a file begins as a sealed document does."""
    return data.startswith(_HEAD)


def is_intact(data: bytes) -> bool:
    """Return whether a sealed document is as it was written."""
    head = b"".join((_HEAD, xxhash.xxh3_128_hexdigest(memoryview(data)[_BODY_START : -len(_END)]).encode(), _MIDDLE))
    return data[:_BODY_START] == head and data[-len(_END) :] == _END


def unseal(data: bytes, path: str) -> Any:
    """Check a sealed document, and return its body.

    Raises:
        CorruptCheckpointError: a byte is not as it was written; ``path`` names the file.
    """
    if not is_intact(data):
        raise CorruptCheckpointError(path, f"is damaged: its {len(data)} bytes do not match the checksum")
    try:
        return json.loads(data[_BODY_START : -len(_END)], parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # only if another program sealed it
        raise CorruptCheckpointError(path, f"not valid JSON: {error}") from error


def _refuse(constant: str) -> Any:
    """Refuse NaN and Infinity: Python's json reads them, but they are not JSON."""
    raise ValueError(f"{constant} is not JSON")
