"""What ranks tell each other comes out of the rendezvous as it went in."""

from __future__ import annotations

from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stager import InternalError
from stager.ranks.messages import KINDS, KindOfRank, LeafEntry, SaveFailed, decode, encode

_LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(st.characters(codec=None), max_size=20),  # with surrogates, as file names that are no UTF-8 have
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field of this type."""
    if hint in _LEAVES:
        return _LEAVES[hint]
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:
        return st.none() | values_of(arguments[0])
    if get_origin(hint) is tuple:
        return st.lists(values_of(arguments[0]), max_size=4).map(tuple)
    if get_origin(hint) is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=4)
    return st.builds(hint, **{name: values_of(field) for name, field in get_type_hints(hint).items()})


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_every_message_comes_out_as_it_went_in(kind: type[Any], data: st.DataObject) -> None:
    message = data.draw(values_of(kind))
    found = decode(encode(message))
    assert found == message
    assert type(found) is kind


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_every_message_is_frozen_and_says_who_posts_it(kind: type[Any]) -> None:
    assert kind.__dataclass_params__.frozen
    assert len(kind.__doc__) > 40  # not the signature that dataclass writes


def test_rows_come_out_as_rows() -> None:
    message = decode(encode(KindOfRank("digest", (LeafEntry("w", "float32", (2, 3)),))))
    assert isinstance(message, KindOfRank)
    assert message.entries[0].what == "float32 of shape (2, 3)"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SaveFailed",
        b"SaveFailed []",
        b"Unheard {}",
        b"\xff {}",
        encode(SaveFailed("error", (1,)))[:-4],
        b'SaveFailed {"error":"x","ranks":[],"is_unfinished":false,"more":1}',
    ],
)
def test_what_is_no_message_is_an_error_that_shows_it(data: bytes) -> None:
    with pytest.raises(InternalError, match="which is no message of this version of stager"):
        decode(data)
