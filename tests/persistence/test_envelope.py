"""A sealed document notices every change."""

from __future__ import annotations

import json

import pytest

from stager.workers.checkpoint.documents.envelope import seal, seal_json, unseal
from stager.workers.errors import CorruptCheckpointError

BODY = {"step": 3, "files": [["a", 1]], "text": "grüße", "number": 0.1, "none": None}


def test_round_trip_and_plain_json() -> None:
    data = seal(BODY)
    assert unseal(data, "p") == BODY
    assert json.loads(data)["body"] == BODY


def test_every_changed_bit_of_every_byte_is_refused() -> None:
    data = seal(BODY)
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(CorruptCheckpointError, match=r"^somewhere: "):
                unseal(bytes(changed), "somewhere")


def test_every_truncation_and_addition_is_refused() -> None:
    data = seal(BODY)
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            unseal(data[:length], "p")
    for position in range(len(data) + 1):
        with pytest.raises(CorruptCheckpointError):
            unseal(data[:position] + b" " + data[position:], "p")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"NaN", b'{"a":Infinity}', b"[" * 100_000, b"1" * 10_000, b'{"a":1}{']
)
def test_what_is_sealed_but_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="not valid JSON"):
        unseal(seal_json(body), "p")
