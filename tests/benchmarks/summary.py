"""From samples to figures: medians with spread, and ratios pair by pair."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from tests.benchmarks.cases import CASES, Kind
from tests.benchmarks.records import (
    Descriptors,
    Load,
    Memory,
    Opened,
    Save,
    SoakPoint,
    Speed,
    State,
    Stretch,
)
from tests.benchmarks.results import CaseResults, Row


class Unit(Enum):
    SECS = "s"
    RATIO = "ratio"
    MIB = "MiB"
    COUNT = "count"
    GB_PER_SEC = "GB/s"


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some samples: the median, the least, the most, how many."""

    median: float
    least: float
    most: float
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread | None:
        """None of none."""
        found = sorted(values)
        return Spread(statistics.median(found), found[0], found[-1], len(found)) if found else None


@dataclass(frozen=True, slots=True)
class Figure:
    """One column: what it is called, its unit, and its samples in a row."""

    title: str
    unit: Unit
    samples: Callable[[Row], list[float]]

    def spread(self, row: Row) -> Spread | None:
        return Spread.of(self.samples(row))


def first(row: Row, what: Callable[[Save], float]) -> list[float]:
    return [what(save) for save in row.of(Save) if save.index == 0]


def later(row: Row, what: Callable[[Save], float]) -> list[float]:
    return [what(save) for save in row.of(Save) if save.index > 0]


def memcpy_ratio(save: Save) -> float:
    """Until the state may be changed, in copies of the same bytes with the same threads, measured right before."""
    return save.staged_secs / save.limits.memcpy_threads_secs


def write_ratio(save: Save) -> float:
    return save.stored_secs / save.limits.write_secs


def cost(stretch: Stretch) -> float:
    """What one save cost the loop, seconds."""
    return stretch.with_secs - stretch.without_secs


def _uncertainty(samples: list[float]) -> list[float]:
    """Standard error of the median, as if the samples were normally distributed. Needs three."""
    return [1.2533 * statistics.stdev(samples) / len(samples) ** 0.5] if len(samples) > 2 else []


_MIB = 1 << 20

SAVES = (
    Figure("warmup", Unit.SECS, lambda r: [o.warmup_secs for o in r.of(Opened) if o.warmup_secs is not None]),
    Figure("blocked, first", Unit.SECS, lambda r: first(r, lambda s: s.blocked_secs)),
    Figure("blocked", Unit.SECS, lambda r: later(r, lambda s: s.blocked_secs)),
    Figure("staged, first", Unit.SECS, lambda r: first(r, lambda s: s.staged_secs)),
    Figure("staged", Unit.SECS, lambda r: later(r, lambda s: s.staged_secs)),
    Figure("staged / memcpy", Unit.RATIO, lambda r: later(r, memcpy_ratio)),
    Figure("load", Unit.SECS, lambda r: [load.secs for load in r.of(Load)]),
    Figure("stored, first", Unit.SECS, lambda r: first(r, lambda s: s.stored_secs)),
    Figure("stored", Unit.SECS, lambda r: later(r, lambda s: s.stored_secs)),
    Figure("stored / write", Unit.RATIO, lambda r: later(r, write_ratio)),
    Figure("trainer's speed", Unit.RATIO, lambda r: [s.saving_per_sec / s.alone_per_sec for s in r.of(Speed)]),
    Figure("memory before", Unit.MIB, lambda r: [m.base_bytes / _MIB for m in r.of(Memory)]),
    Figure("peak memory", Unit.MIB, lambda r: [m.peak_bytes / _MIB for m in r.of(Memory)]),
    Figure("descriptors", Unit.COUNT, lambda r: [float(d.after - d.before) for d in r.of(Descriptors)]),
)
LOOP = (
    Figure("cost of a save", Unit.SECS, lambda r: [cost(s) for s in r.of(Stretch)]),
    Figure("its uncertainty", Unit.SECS, lambda r: _uncertainty([cost(s) for s in r.of(Stretch)])),
    Figure("cost / memcpy", Unit.RATIO, lambda r: [cost(s) / s.memcpy_threads_secs for s in r.of(Stretch)]),
    Figure("blocked of it", Unit.SECS, lambda r: [s.blocked_secs for s in r.of(Stretch)]),
    Figure("stretch without", Unit.SECS, lambda r: [s.without_secs for s in r.of(Stretch)]),
    Figure("memcpy", Unit.SECS, lambda r: [s.memcpy_threads_secs for s in r.of(Stretch)]),
    Figure("compute of a step", Unit.SECS, lambda r: [s.compute_secs for s in r.of(Stretch)]),
    Figure("stored in time", Unit.RATIO, lambda r: [float(s.stored_in_time) for s in r.of(Stretch)]),
)


def soak_ends(row: Row) -> tuple[SoakPoint, SoakPoint] | None:
    """After twenty saves (or the first point there is) and at the end."""
    points = row.of(SoakPoint)
    if len(points) < 2:
        return None
    return next((p for p in points if p.saves >= 20), points[0]), points[-1]


def _soak(what: Callable[[SoakPoint], float], end: int) -> Callable[[Row], list[float]]:
    def samples(row: Row) -> list[float]:
        ends = soak_ends(row)
        return [what(ends[end])] if ends else []

    return samples


SOAK = (
    Figure("saves", Unit.COUNT, _soak(lambda p: p.saves, 1)),
    Figure("memory after 20", Unit.MIB, _soak(lambda p: p.pss_bytes / _MIB, 0)),
    Figure("memory at the end", Unit.MIB, _soak(lambda p: p.pss_bytes / _MIB, 1)),
    Figure("descriptors after 20", Unit.COUNT, _soak(lambda p: p.all_fds, 0)),
    Figure("descriptors at the end", Unit.COUNT, _soak(lambda p: p.all_fds, 1)),
    Figure("seconds a save", Unit.SECS, _soak(lambda p: p.elapsed_secs / p.saves, 1)),
)


_FIGURES = {Kind.SAVES: SAVES, Kind.LOOP: LOOP, Kind.SOAK: SOAK}


def figures_of(case: str) -> tuple[Figure, ...]:
    return _FIGURES[CASES[case].kind]


@dataclass(frozen=True, slots=True)
class LimitLine:
    """A limit of the machine, over all samples of the case."""

    title: str
    spread: Spread


def limits_of(case: CaseResults) -> list[LimitLine]:
    saves = [save for row in case.rows.values() for save in row.of(Save)]
    stretches = [stretch for row in case.rows.values() for stretch in row.of(Stretch)]
    found = {
        "memcpy, one thread": [s.limits.memcpy_secs for s in saves] + [s.memcpy_secs for s in stretches],
        "memcpy, stager's threads": [s.limits.memcpy_threads_secs for s in saves]
        + [s.memcpy_threads_secs for s in stretches],
        "_foreach_copy_ of all tensors": [s.limits.foreach_secs for s in saves if s.limits.foreach_secs is not None],
        "pwrite + fsync": [s.limits.write_secs for s in saves],
    }
    return [LimitLine(title, spread) for title, values in found.items() if (spread := Spread.of(values))]


def state_of(case: CaseResults) -> State | None:
    return next((state for row in case.rows.values() for state in row.of(State)), None)
