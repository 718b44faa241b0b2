"""Arbitrary states with every kind of value mixed in: what stager loads equals ``torch.load(torch.save(...))``.

    python -m tests.states.arbitrary --count 10000 --seed 1 [--format dcp]

Strides of views, sharing between leaves, and flags of plain tensors are not compared: docs/states.md says what is kept.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import io
import pathlib
import tempfile
import uuid
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from stager import Checkpointer
from tests.states.corpus.wrappers import TwoTensors
from tests.states.equal import IN_PLACE, differences

IGNORED = IN_PLACE - {"tensor type", "key order"}


class Colour(Enum):
    RED = 1
    BLUE = "b"


class Own(dict[Any, Any]):
    """A mapping of the user's."""


class Row(list[Any]):
    """A list of the user's."""


Pair = namedtuple("Pair", "left right")  # what programs have


class Thing:
    """An object with attributes."""

    def __init__(self, value: Any) -> None:
        self.value = value


_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]


_WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.dim() > 1 else tensor,
    "narrowed": lambda tensor: tensor[1:] if tensor.dim() and len(tensor) > 1 else tensor,
    "expanded": lambda tensor: tensor.unsqueeze(0).expand(3, *tensor.shape),
    "conjugate": lambda tensor: tensor.conj(),
    "negative": lambda tensor: torch._neg_view(tensor) if tensor.dtype is torch.float32 else tensor,
    "wrapper": lambda tensor: TwoTensors(tensor, tensor + 1, 0.5) if tensor.dtype is torch.float32 else tensor,
    "sparse": lambda tensor: tensor.to_sparse() if tensor.dtype is torch.float32 and tensor.dim() else tensor,
}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any shape and dtype; some are views, wrappers or sparse."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    numbers = torch.arange(np.prod(shape, dtype=int), dtype=torch.float32).reshape(shape)
    return _WAYS[draw(st.sampled_from(list(_WAYS)))](numbers.to(draw(st.sampled_from(_DTYPES))))


_numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(allow_nan=False),
    st.text(max_size=8),
    st.binary(max_size=8),
)
_plain = st.one_of(
    _numbers,
    st.sampled_from(
        [Colour.RED, Colour.BLUE, torch.float16, torch.device("cpu"), torch.Size([2, 3]), range(3), slice(1, 2)]
    ),
    st.builds(datetime.datetime.fromtimestamp, st.integers(0, 2**31)),
    st.builds(pathlib.Path, st.sampled_from(["a", "/b/c", "."])),
    st.builds(decimal.Decimal, st.integers()),
    st.builds(uuid.UUID, int=st.integers(0, 2**128 - 1)),
    st.builds(np.float64, st.floats(allow_nan=False)),
    st.builds(np.int16, st.integers(-100, 100)),
    st.builds(lambda n: np.arange(n, dtype=np.float32), st.integers(0, 5)),
    st.frozensets(st.integers(), max_size=3),
    st.sets(st.text(max_size=3), max_size=3),
)
_keys = st.one_of(
    st.text(max_size=4), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False), st.binary(max_size=3),
    st.tuples(st.integers(), st.text(max_size=2)), st.sampled_from([Colour.RED, torch.float32, np.int64(3)]),
)  # fmt: skip


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(_keys, inner, max_size=4)
    lists = st.lists(inner, max_size=4)
    return st.one_of(
        *(dicts, lists, st.builds(tuple, lists), st.builds(OrderedDict, dicts), st.builds(Own, dicts)),
        *(st.builds(Row, lists), st.builds(deque, lists), st.builds(Pair, inner, inner), st.builds(Thing, inner)),
        st.builds(lambda items: defaultdict(list, items), dicts),
        st.builds(Counter, st.dictionaries(st.text(max_size=2), st.integers(), max_size=3)),
        st.builds(lambda value, count: [{"i": i, "v": value} for i in range(count)], _numbers, st.integers(0, 60)),
    )


_values = st.recursive(st.one_of(tensors(), _plain), _containers, max_leaves=12)
STATES = st.dictionaries(st.text(max_size=5), _values, max_size=4)


def check(checkpointer: Checkpointer, step: int, state: dict[str, Any]) -> list[str]:
    """Save a state, load it, and list how it differs from what torch makes of it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, buffer)
        want = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        checkpointer.save(step, state).upload_completion.result()
        loaded = checkpointer.load(step, allow_pickle=True)
    assert loaded is not None
    return differences(loaded.state, want, IGNORED)


def run(file_format: str, count: int, seed_number: int) -> None:
    """Check ``count`` arbitrary states in one format.

    Raises:
        AssertionError: one differs.
    """
    config = {"persistence": {"format": file_format, "fsync": False}, "workers": {"count": 1}}
    with tempfile.TemporaryDirectory() as directory, Checkpointer(directory, config) as checkpointer:

        @seed(seed_number)
        @settings(
            max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        @given(STATES)
        def every_state_is_loaded_as_it_was_saved(state: dict[str, Any]) -> None:
            problems = check(checkpointer, 1, state)
            assert not problems, f"{problems}\n{state!r}"

        every_state_is_loaded_as_it_was_saved()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Arbitrary states against torch.save.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", choices=("dcp", "torch", "safetensors"), default="dcp")
    chosen = parser.parse_args()
    run(chosen.format, chosen.count, chosen.seed)
    print(f"{chosen.count:,} states of format {chosen.format}, seed {chosen.seed}: all as torch.load gives them")


if __name__ == "__main__":
    main()
