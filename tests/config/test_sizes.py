from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager.config.sizes import format_bytes, parse_bytes, parse_memory_limit, parse_share


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        (0, 0),
        (17, 17),
        ("17", 17),
        ("17B", 17),
        ("64KiB", 65536),
        ("64 kib", 65536),
        (" 64MiB ", 64 << 20),
        ("8GiB", 8 << 30),
        ("1TiB", 1 << 40),
        ("1.5GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        ("1.1KiB", 1126),
        ("+3", 3),
    ],
)
def test_size(written: Any, nbytes: int) -> None:
    assert parse_bytes(written) == nbytes


@pytest.mark.parametrize(
    "written",
    [
        "",
        "GiB",
        "1.5",
        "1.5B",
        "1e9",
        "64 M iB",
        "64Mib/s",
        "1,5GB",
        "-1",
        "-1GiB",
        -1,
        True,
        1.5,
        None,
        [1],
        "٣GiB",
        "nan",
    ],
)
def test_not_a_size(written: Any) -> None:
    with pytest.raises(ValueError, match=r"not a|negative"):
        parse_bytes(written)


@pytest.mark.parametrize(
    ("written", "share"), [("75%", "0.75"), (" 12.5 % ", "0.125"), ("100%", "1"), ("0.1%", "0.001")]
)
def test_share(written: str, share: str) -> None:
    assert parse_share(written) == Decimal(share)


def test_text_without_percent_is_no_share() -> None:
    assert parse_share("75") is None


@pytest.mark.parametrize("written", ["0%", "-5%", "100.1%"])
def test_share_out_of_range(written: str) -> None:
    with pytest.raises(ValueError, match="not above 0% and at most 100%"):
        parse_share(written)


def test_memory_limit_keeps_a_share_as_text_and_turns_a_size_into_bytes() -> None:
    assert parse_memory_limit(" 75% ") == "75%"
    assert parse_memory_limit("8GiB") == 8 << 30


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (64 << 20, "64.0 MiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5.0 PiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_formatted(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 1 << 60))
def test_formatted_size_parses_back_to_within_its_one_decimal(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.051)
