"""JSON documents that notice any changed byte.

    {"xxh3_128":"<32 hex digits>","body":<the body, compact JSON>}\\n

The hash is over the body's bytes as they stand in the file, and everything around them is compared literally, so there is
no byte whose change goes unseen. It is still plain JSON for every other reader.
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
    """Seal what is JSON already."""
    return b"".join((_HEAD, xxhash.xxh3_128_hexdigest(data).encode(), _MIDDLE, data, _END))


def unseal(data: bytes, path: str) -> Any:
    """The body of a sealed document.

    Raises:
        CorruptCheckpointError: a byte is not as it was written; ``path`` names the file.
    """
    body = data[_BODY_START : -len(_END)]
    expected = b"".join((_HEAD, xxhash.xxh3_128_hexdigest(body).encode(), _MIDDLE))
    if data[:_BODY_START] != expected or data[-len(_END) :] != _END:
        raise CorruptCheckpointError(path, f"its checksum does not match its {len(data)} bytes")
    try:
        return json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # only if it was sealed by something else
        raise CorruptCheckpointError(path, f"not valid JSON: {error}") from error


def _refuse(constant: str) -> Any:
    """NaN and Infinity, which Python's json reads although they are no JSON."""
    raise ValueError(f"{constant} is not JSON")
