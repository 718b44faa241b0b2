"""What the demo found: the checks that decide its exit code, and the figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from stager.demo.events import MeasuredSave, Stretch
from stager.demo.leg import Leg


@dataclass(frozen=True)
class Check:
    """One thing the demo has to show."""

    name: str
    ok: bool
    detail: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class LostTime:
    """What saves of one method cost the training loop; medians over ``samples``, in seconds."""

    method: str
    samples: tuple[MeasuredSave, ...]

    @property
    def blocked_secs(self) -> float:
        """How long the call took."""
        return statistics.median(sample.blocked_secs for sample in self.samples)

    @property
    def lost_secs(self) -> float:
        """What the loop took longer because of the save, the call included."""
        return statistics.median(sample.lost_secs for sample in self.samples)

    @property
    def done_secs(self) -> float:
        """From the call until the method said that the save was complete."""
        return statistics.median(sample.done_secs for sample in self.samples)

    @property
    def lost_range_secs(self) -> tuple[float, float]:
        """The smallest and the largest loss."""
        lost = [sample.lost_secs for sample in self.samples]
        return min(lost), max(lost)


@dataclass(frozen=True)
class Measurement:
    """What the measuring process found."""

    methods: tuple[LostTime, ...]
    stretches: tuple[Stretch, ...]

    @staticmethod
    def of(samples: Sequence[MeasuredSave], stretches: Sequence[Stretch]) -> Measurement:
        """Group samples, which are in the order in which they were measured, by method."""
        names = dict.fromkeys(sample.method for sample in samples)
        methods = (LostTime(name, tuple(s for s in samples if s.method == name)) for name in names)
        return Measurement(tuple(methods), tuple(stretches))

    @property
    def step_secs(self) -> float:
        """The median step without a save, in seconds."""
        return statistics.median(stretch.secs / stretch.num_steps for stretch in self.stretches)

    @property
    def noise_secs(self) -> float:
        """By how much two neighbouring stretches without a save differ (median), in seconds.

        A loss below this cannot be told from no loss.
        """
        return statistics.median(abs(one.secs - other.secs) for one, other in pairwise(self.stretches))

    def relative_loss(self, method: LostTime) -> float | None:
        """Return the method's lost time as a multiple of the first method's; None if that is below the noise."""
        reference = self.methods[0].lost_secs
        return method.lost_secs / reference if reference > self.noise_secs else None


@dataclass
class Results:
    """Everything the demo reports.

    Attributes:
        truth: the uninterrupted run.
        legs: of the killed run, in order.
        others: resumed from one checkpoint of that run on other numbers of ranks.
        measurement: None: no lost time was measured.
    """

    truth: Leg = field(default_factory=lambda: Leg("uninterrupted", Path()))
    checks: list[Check] = field(default_factory=list)
    legs: list[Leg] = field(default_factory=list)
    others: list[Leg] = field(default_factory=list)
    measurement: Measurement | None = None
    elapsed_secs: float = 0.0

    @property
    def runs(self) -> list[Leg]:
        """Every leg of every run."""
        return [self.truth, *self.legs, *self.others]

    @property
    def ok(self) -> bool:
        """Whether all was shown."""
        return all(check.ok for check in self.checks)
