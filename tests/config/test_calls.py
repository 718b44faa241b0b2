"""Calls that do not fit a signature."""

from __future__ import annotations

from typing import Any

import pytest

from stager import ArgumentError
from stager.config.calls import explained


@explained("train(3, data)")
def train(step: int, data: Any = None, *, dry_run: bool = False, only: Any = None) -> int:
    """Raises a TypeError of its own if there is no data."""
    return step + len(data)


def call(*args: Any, **kwargs: Any) -> int:
    return train(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "train() needs step, as in train(3, data); step is missing"),
        (
            (1,),
            {"step": 2},
            "train() was given step twice, by position and by name; write it once, as in train(3, data)",
        ),
        ((1,), {"dry_ran": True}, "train() has no argument dry_ran; did you mean dry_run?"),
        ((1,), {"xyz": 1}, "train() has no argument xyz (it has: step, data, dry_run, only)"),
        (
            (1,),
            {"keep_latest": 1},
            "train() has no argument keep_latest; retention.keep_latest is a setting of the config",
        ),
        (
            (1, [], True, train),
            {},
            "train() takes only step and data by position; write dry_run=True, only=... if that is what you mean (arguments "
            "by name: dry_run, only)",
        ),
    ],
)
def test_call_that_does_not_fit_says_what_to_write(args: Any, kwargs: Any, said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        call(*args, **kwargs)
    assert said in str(raised.value)
    assert isinstance(raised.value.__cause__, TypeError)


def test_error_that_the_function_itself_raises_is_left_alone() -> None:
    assert call(1, [2, 3]) == 3
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)") as raised:
        call(1, 2)
    assert type(raised.value) is TypeError


@explained("save(100, state)")
def save(step: int, state: Any) -> None:
    """As ``Checkpointer.save()``."""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "save() needs step and state, as in save(100, state); step and state are missing"),
        ((3,), "save() needs step and state, as in save(100, state); state is missing"),
        (({"a": 1},), "save() takes the step first, as in save(100, state); got a dict in the place of the step"),
    ],
)
def test_state_without_a_step(args: Any, said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        save(*args)
    assert str(raised.value) == said
