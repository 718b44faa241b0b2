"""What a save costs a loop, beside a framework's own way: the rounds, and the table. See ``compare_*.py``."""

from __future__ import annotations

import argparse
import platform
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from stager.workers._version import __version__

NUM_SAVES = 5  # of a training that count; the first one is left out
WITHOUT = "no save"

Measured = tuple[list[float], list[float], float, int]
"""Of one training: the seconds between saves, those in the calls, those at the end, and the bytes of the state."""


def parser_of(description: str | None, rounds: int = 4) -> argparse.ArgumentParser:
    """Make the parser of a comparison's options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("directory", type=Path, help="where checkpoints are written; what is made there is removed")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--every", type=int, default=8, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def compare(
    framework: str,
    ways: Sequence[str],
    train: Callable[[str, Path, argparse.Namespace], Measured],
    options: argparse.Namespace,
    call: str = "save()",
) -> None:
    """Train in each way, several times, and print a table of medians.

    Args:
        framework: its name and version.
        ways: names; ``WITHOUT`` is the one that saves nothing.
        train: trains in one way, into a directory that it removes.
        call: what a user calls.
    """
    warnings.simplefilter("ignore")
    between: dict[str, list[float]] = {way: [] for way in ways}
    calls: dict[str, list[float]] = {way: [] for way in ways}
    ends: dict[str, list[float]] = {way: [] for way in ways}
    nbytes = 0
    for number in range(options.rounds):
        first = number % len(ways)
        for way in (*ways[first:], *ways[:first]):  # none is always the first
            intervals, in_calls, end, written = train(way, options.directory / "compared", options)
            between[way] += intervals
            calls[way] += in_calls
            ends[way].append(end)
            nbytes = max(nbytes, written)
    plain = statistics.median(between[WITHOUT])
    low, _, high = statistics.quantiles(between[WITHOUT])
    print(
        f"{framework}, torch {torch.__version__}, stager {__version__}, Python {platform.python_version()}; "
        f"{nbytes / 1e6:.0f} MB a checkpoint, a save every {options.every} steps of {plain / options.every:.3f} s; "
        f"{options.rounds} rounds of {NUM_SAVES} saves; half of the intervals without a save are within {high - low:.3f} s"
    )
    for way in ways:
        lost = statistics.median(between[way]) - plain
        in_call, at_end = statistics.median(calls[way]), statistics.median(ends[way])
        print(f"{way:34} {lost:7.3f} s lost per save   {in_call:7.3f} s in {call}   {at_end:7.3f} s at the end")
