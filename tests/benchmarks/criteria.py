"""What stager promises, as ratios of one run: measured, target, met or not. Printed and recorded, never asserted.

Times that a promise gives in milliseconds are for the machine it was made on; every other line compares with what was
measured beside it. Each line is there for copying in the trainer and for copying in the workers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from tests.benchmarks.records import Memory, Save, Speed, State, Stretch
from tests.benchmarks.results import Results, Row
from tests.benchmarks.summary import cost, first, later, memcpy_ratio, soak_ends

_MIB = 1 << 20
_BUFFERS = 2  # arena.buffers by default
_SOAK_NOISE_BYTES = 8 * _MIB  # of some hundred MiB: what collectors and allocators come and go with


class Verdict(Enum):
    MET = "met"
    NOT_MET = "not met"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line. ``measured`` and ``target`` as they are printed."""

    name: str
    measured: str
    target: str
    verdict: Verdict


def evaluate(results: Results) -> list[Criterion]:
    lines: list[Criterion] = []
    for plain, guarded, where in (
        ("stager", "stager-guarded", ""),
        ("stager-workers", "stager-guarded-workers", ", location: workers"),
    ):
        lines += _stall(results, plain, where)
        if not where:
            lines += _first_save(results)
        lines += _loop(results, guarded, where)
        lines += _small(results, plain, guarded, where)
        lines += _speed(results, plain, where)
        lines += _memory(results, plain, where)
    return lines


def _stall(results: Results, peer: str, where: str) -> Iterator[Criterion]:
    for case in ("big", "gpt2"):
        row = results.row(case, peer)
        ratio = _median(later(row, memcpy_ratio)) if row else None
        yield _at_most(f"{case}: unguarded stall / memcpy, same threads{where}", ratio, 1.15)
        ratio = _median(_first_to_later(row)) if row else None
        yield _at_most(f"{case}: first save after warmup() / a later one{where}", ratio, 1.3)


def _first_to_later(row: Row) -> list[float]:
    """Pass by pass: a first save against the later ones of the same process."""
    ratios = []
    for opening in (save for save in row.of(Save) if save.index == 0):
        others = [s.staged_secs for s in row.of(Save) if s.index and s.round == opening.round]
        if others:
            ratios.append(opening.staged_secs / statistics.median(others))
    return ratios


def _first_save(results: Results) -> Iterator[Criterion]:
    for case in ("big", "gpt2"):
        ours = _staged_first(results.row(case, "stager-cold"))
        theirs = _either(results, case, _staged_first)
        name = f"{case}: first save without warmup() / torch_checkpointing's first"
        yield _at_most(name, _divide(ours, theirs), 0.25)


def _staged_first(row: Row | None) -> float | None:
    return _median(first(row, lambda save: save.staged_secs)) if row else None


def _either(results: Results, case: str, what: Callable[[Row | None], float | None]) -> float | None:
    """torch_checkpointing at its best: its defaults or without O_DIRECT, whichever works and is faster."""
    found = [what(results.row(case, peer)) for peer in ("torch-checkpointing", "torch-checkpointing-buffered")]
    return min((value for value in found if value is not None), default=None)


def _loop(results: Results, peer: str, where: str) -> Iterator[Criterion]:
    row = results.row("loop", peer)
    ratios = [cost(s) / s.memcpy_threads_secs for s in row.of(Stretch)] if row else []
    yield _at_most(f"loop: cost of a guarded save / memcpy, same threads{where}", _median(ratios), 0.25)
    theirs = _either(results, "loop", _cost)
    name = f"loop: cost of a guarded save, less torch_checkpointing's, ms{where}"
    ours = _cost(row)
    yield _at_most(name, None if ours is None or theirs is None else (ours - theirs) * 1e3, 0.0)


def _cost(row: Row | None) -> float | None:
    return _median([cost(stretch) for stretch in row.of(Stretch)]) if row else None


def _small(results: Results, plain: str, guarded: str, where: str) -> Iterator[Criterion]:
    stall = _staged(results.row("small", plain))
    theirs = _staged(results.row("small", "dcp-thread"))
    at_size = results.scale == 1
    yield _at_most(f"small: stall / dcp.async_save's{where}", _divide(stall, theirs), 0.1)
    yield _at_most(f"small: stall, ms{where}", stall * 1e3 if stall and at_size else None, 60)
    held = results.row("small", guarded)
    blocked = _median(later(held, lambda save: save.blocked_secs)) if held else None
    yield _at_most(f"small: guarded, blocked, ms{where}", blocked * 1e3 if blocked and at_size else None, 30)
    many = results.row("many", plain)
    if many is not None and (many.of(Save) or many.outcome != "ok"):
        worked = many.outcome == "ok"
        name = f"many: works with 1,024 open files{where}"
        yield Criterion(name, many.outcome, "ok", Verdict.MET if worked else Verdict.NOT_MET)
    yield _at_most(f"many: stall / stall of small{where}", _divide(_staged(many), stall), 11)


def _staged(row: Row | None) -> float | None:
    return _median(later(row, lambda save: save.staged_secs)) if row else None


def _speed(results: Results, peer: str, where: str) -> Iterator[Criterion]:
    for case in ("big", "gpt2", "small"):
        row = results.row(case, peer)
        ratios = [s.saving_per_sec / s.alone_per_sec for s in row.of(Speed)] if row else []
        yield _at_least(f"{case}: a one-thread trainer's speed while persisting{where}", _median(ratios), 0.95)


def _memory(results: Results, peer: str, where: str) -> Iterator[Criterion]:
    for case in ("big", "gpt2"):
        yield _peak(results.row(case, peer), f"{case}: peak memory of the tree, MiB{where}")
    row = results.row("soak", peer)
    ends = soak_ends(row) if row else None
    count = f"{ends[1].saves:,}" if ends else "thousands of"
    grown = (ends[1].pss_bytes - ends[0].pss_bytes) / _MIB if ends else None
    yield _at_most(f"soak: memory after {count} saves, less after 20, MiB{where}", grown, _SOAK_NOISE_BYTES / _MIB)
    opened = float(ends[1].all_fds - ends[0].all_fds) if ends else None
    yield _at_most(f"soak: descriptors after {count} saves, less after 20{where}", opened, 0)


def _peak(row: Row | None, name: str) -> Criterion:
    """State x (1 + buffers) + 100 MiB + 250 MiB per worker, the interpreter and torch of the trainer included."""
    memory = row.of(Memory) if row else []
    state = row.of(State) if row else []
    if not memory or not state:
        return Criterion(name, "", "", Verdict.NOT_MEASURED)
    workers = memory[0].num_processes - 1
    limit = state[0].nbytes * (1 + _BUFFERS) / _MIB + 100 + 250 * workers
    return _at_most(name, memory[0].peak_bytes / _MIB, limit)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _at_most(name: str, measured: float | None, limit: float) -> Criterion:
    return _compare(name, measured, "at most", limit, lambda value: value <= limit)


def _at_least(name: str, measured: float | None, limit: float) -> Criterion:
    return _compare(name, measured, "at least", limit, lambda value: value >= limit)


def _compare(name: str, measured: float | None, words: str, limit: float, holds: Callable[[float], bool]) -> Criterion:
    target = f"{words} {limit:,.4g}"
    if measured is None:
        return Criterion(name, "", target, Verdict.NOT_MEASURED)
    return Criterion(name, f"{measured:,.4g}", target, Verdict.MET if holds(measured) else Verdict.NOT_MET)
