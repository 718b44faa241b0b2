"""Plain values take the fast way and come back as pickle makes them; whatever could do harm does not take it."""

from __future__ import annotations

import datetime
import pickle
import sys
from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stager.loading.pickles.plain_pickle import NOT_PLAIN, plain_value
from stager.workers.checkpoint.formats.object_pickle import SMALL_RECORDS, pickle_object
from stager.workers.checkpoint.formats.zip_records import archive

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="the fast way needs possessive quantifiers")

ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300) | st.sampled_from(["a", "key"])
KEYS = ATOMS | st.tuples(ATOMS, ATOMS)
VALUES = st.recursive(
    ATOMS | st.frozensets(ATOMS),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner) | st.tuples(inner, inner) | st.sets(ATOMS),
)


def blob_of(data: bytes) -> bytes:
    return archive([("data.pkl", data), *SMALL_RECORDS])


@given(VALUES)
def test_any_plain_value_comes_back_or_takes_the_slow_way(value: Any) -> None:
    found = plain_value(pickle_object(value, 0).blob)
    if found is not NOT_PLAIN:
        assert _shown(found) == _shown(pickle.loads(pickle.dumps(value, 2)))


def _shown(value: Any) -> str:
    """For comparing: nan is not equal to itself, and equal sets may have another order."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__} {sorted(map(_shown, value))}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} {list(map(_shown, value))}"
    if isinstance(value, dict):
        return f"dict {[(_shown(key), _shown(inner)) for key, inner in value.items()]}"
    return repr(value)


@pytest.mark.parametrize(
    "value",
    [
        *(3, "x" * 100_000, [], {}, [1.5, None, True, -(1 << 70)], {"a": [1, {"b": "c"}]}, {1: 2, None: 3, 2.5: "x"}),
        *([{"loss": i / 3, "step": i} for i in range(1000)], list(range(70_000)), {(1, 2): (3,)}, set(range(300))),
        [[[i, j] for i in range(30)] for j in range(30)],
    ],
    ids=lambda value: repr(value)[:20],
)
def test_takes_the_fast_way(value: Any) -> None:
    assert plain_value(pickle_object(value, 0).blob) == value


@pytest.mark.parametrize(
    "value",
    [datetime.date(2026, 1, 1), deque([1]), OrderedDict(a=1), torch.ones(2), print, 1j, b"bytes", [ValueError()]],
)
def test_any_class_takes_the_slow_way(value: Any) -> None:
    assert plain_value(pickle_object(value, 0).blob) is NOT_PLAIN


def test_a_value_in_itself_takes_the_slow_way() -> None:
    cycle: list[Any] = [1]
    cycle.append(cycle)
    assert plain_value(pickle_object(cycle, 0).blob) is NOT_PLAIN


HOSTILE = {
    "names a function": b"cos\nsystem\nX\x04\0\0\0true\x85R.",
    "names a function behind a set": b"c__builtin__\nset\n)R0cos\nsystem\nX\x04\0\0\0true\x85R.",
    "builds": b"}}b.",
    "an extension": b"\x82\x01.",
    "a persistent id": b"K\x01Q.",
    "a huge memo": b"Nr\xff\xff\xff\x7f.",
    "deep": b"]" * 5000 + b"a" * 4999 + b".",
    "deep tuples": b")" + b"\x85" * 5000 + b".",
    "deep key": b"})" + b"\x85" * 5000 + b"Ns.",
    "a tuple used twice, again and again": b"})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(100)) + b"Ns.",
    "lists used twice, again and again": b"]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(60)) + b".",
    "many sets of sets": b"c__builtin__\nset\n" * 100 + b"](K\x01K\x02e" + b"\x85R" * 100 + b".",
    "sets without end": b"c__builtin__\nset\nq\x00" + b"h\x00" * 100 + b"](K\x01K\x02e" + b"\x85R" * 101 + b".",
    "nothing": b"",
    "no end": b"K\x01",
    "something behind its end": b"K\x01.K\x02.",
    "a text longer than the pickle": b"X\xff\xff\xff\x7fabc.",
    "pops too much": b"e.",
    "two values": b"K\x01K\x02e.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_could_do_harm_takes_the_slow_way(name: str) -> None:
    assert plain_value(blob_of(b"\x80\x02" + HOSTILE[name])) is NOT_PLAIN


def test_a_deep_key_ends_no_process() -> None:
    """Hashing a tuple goes through it by recursion in C."""
    assert plain_value(blob_of(b"\x80\x02})" + b"\x85" * 3_000_000 + b"Ns.")) is NOT_PLAIN
    nested = b"(" * 3_000_000 + b"t" * 3_000_000
    assert plain_value(blob_of(b"\x80\x02}" + nested + b"Ns.")) is NOT_PLAIN
    chained = b"".join(b"r%bj%b\x85" % (n.to_bytes(4, "little"), n.to_bytes(4, "little")) for n in range(500_000))
    assert plain_value(blob_of(b"\x80\x02})" + chained + b"Ns.")) is NOT_PLAIN


@pytest.mark.parametrize("blob", [b"", b"PK\3\4", b"x" * 200, blob_of(b"\x80\x02N.")[:66]])
def test_no_archive_takes_the_slow_way(blob: bytes) -> None:
    assert plain_value(blob) is NOT_PLAIN
