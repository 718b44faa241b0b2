"""Values of Python and of its standard library."""

from __future__ import annotations

import array
import datetime
import decimal
import fractions
import io
import pathlib
import random
import re
import threading
import uuid
import zoneinfo
from collections import deque
from functools import partial
from typing import Any

import torch

from tests.states.corpus.registry import Expect, state, values
from tests.states.corpus.tensors import rand

values(
    "python values",
    {
        "none": lambda: None,
        "bools-and-ints": lambda: [True, False, 0, -1, 2**80, -(2**63)],
        "floats": lambda: [0.1, -0.0, float("inf"), float("-inf"), float("nan"), 5e-324],
        "complex": lambda: complex(1, -0.0),
        "text": lambda: "grüße \0 \ud83d\ude00",
        "text-surrogate": lambda: "a\udc80b",
        "text-long": lambda: "x" * 1_000_000,
        "bytes": lambda: b"\0\xff",
        "bytearray": lambda: bytearray(b"\0\xff"),
        "empty-containers": lambda: [[], (), {}, set(), "", b""],
        "tuple-of-plain": lambda: (1, "two", 3.0),
        "tuple-with-tensor": lambda: (1, rand(3)),
        "tuple-nested-tensors": lambda: ((rand(1), [rand(2)]), {"a": (rand(3),)}),
        "tuple-of-dicts": lambda: ({"a": rand(1)}, {"b": 2}),
        "list-of-lists": lambda: [[1, 2], [3, [4, [rand(1)]]]],
        "list-with-tensor": lambda: [1, rand(3), {"k": None}],
        "list-of-tuples": lambda: [(rand(1), 1), (rand(1), 2)],
        "set": lambda: {1, 2, 3},
        "set-of-tuples": lambda: {("a", 1), ("b", 2)},
        "frozenset": lambda: frozenset({1, 2}),
        "size": lambda: torch.Size([2, 3]),
        "dtype": lambda: torch.bfloat16,
        "device": lambda: [torch.device("cpu"), torch.device("cuda", 1)],
        "layout": lambda: [torch.strided, torch.sparse_coo],
        "list-of-ints": lambda: list(range(100_000)),
        "log-history": lambda: [{"loss": i / 7, "step": i, "epoch": 0.1} for i in range(1000)],
        "log-history-in-list": lambda: [rand(1), [{"loss": i / 7, "step": i} for i in range(100)]],
        "ragged-dict-of-lists": lambda: {f"k{i}": [j / 3 for j in range(i)] for i in range(50)},
        "python-random-state": lambda: random.Random(3).getstate(),
        "torch-rng-state": torch.get_rng_state,
    },
)
values(
    "standard library",
    {
        "datetime": lambda: datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
        "date-and-timedelta": lambda: [datetime.date(2026, 1, 2), datetime.timedelta(seconds=1.5), datetime.time(1, 2)],
        "path": lambda: pathlib.PurePosixPath("a/b"),
        "path-in-tuple": lambda: (1, pathlib.Path("x")),
        "decimal": lambda: decimal.Decimal("1.10"),
        "uuid": lambda: uuid.UUID(int=5),
        "range": lambda: range(1, 10, 3),
        "deque": lambda: deque([1, 2, 3], maxlen=5),
        "deque-with-tensors": lambda: deque([rand(1), rand(2)]),
        "slice": lambda: slice(1, None, 2),
        "ellipsis": lambda: ...,
        "python-random": lambda: random.Random(3),
    },
    by_default=True,
)
values(
    "standard library",
    {
        "fraction": lambda: fractions.Fraction(1, 3),
        "array": lambda: array.array("d", [1.0, 2.0]),
        "zone": lambda: zoneinfo.ZoneInfo("UTC"),
        "pattern": lambda: re.compile("a+"),
        "bytes-io": lambda: io.BytesIO(b"abc"),
        "partial": lambda: partial(sorted, reverse=True),
        "builtin-function": lambda: [len, torch.relu, torch.nn.functional.gelu],
        "class-as-value": lambda: torch.nn.Linear,
        "exception": lambda: ValueError("bad", 3),
        "not-implemented": lambda: NotImplemented,
    },
)
values(
    "no bytes",
    {
        "lambda": lambda: lambda: 1,
        "lambda-in-list": lambda: [rand(1), lambda: 1],
        "generator-object": lambda: (i for i in range(3)),
        "lock": threading.Lock,
        "file": lambda: io.TextIOWrapper(io.BytesIO()),
        "module-object": lambda: torch,
        "weak-lock-in-dict": lambda: {"a": {"b": [threading.RLock()]}},
        "iterator-of-dict": {"a": 1}.items,
    },
    expect=Expect.REFUSED,
)


@state("no-entries", "python values")
def _empty() -> dict[str, Any]:
    return {}


@state("no-tensors", "python values")
def _plain() -> dict[str, Any]:
    return {"step": 3, "name": "run", "lr": 0.1}
