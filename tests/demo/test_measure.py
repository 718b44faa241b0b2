"""The lost time is right to the last digit, on a clock that only the trained steps and the saves move."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from stager.demo import measure as measure_module
from stager.demo.events import MeasuredSave, Stretch
from stager.demo.measure import Meter, measure
from stager.demo.results import Measurement


class Clock:
    """Stands still unless it is told to move; runs what was planned for a time when that is reached."""

    def __init__(self) -> None:
        self.now = 0.0
        self.planned: list[tuple[float, Future[None]]] = []

    def perf_counter(self) -> float:
        return self.now

    def advance(self, secs: float) -> None:
        target = self.now + secs
        for due, future in sorted(self.planned, key=lambda item: item[0]):
            if due <= target and not future.done():
                self.now = due
                future.set_result(None)
        self.now = target


class Run:
    """A training run whose step takes one second, and more while a save is being written."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def train_step(self) -> float:
        busy = any(not future.done() for _, future in self.clock.planned)
        self.clock.advance(1.25 if busy else 1.0)
        return 0.0


class FakeSaver:
    """Blocks for one time and is complete after another."""

    def __init__(self, clock: Clock, method: str, blocked_secs: float, done_secs: float) -> None:
        self.clock, self.method = clock, method
        self.blocked_secs, self.done_secs = blocked_secs, done_secs
        self.discarded = 0

    def save(self, step: int) -> Future[None]:
        future: Future[None] = Future()
        self.clock.planned.append((self.clock.now + self.done_secs, future))
        self.clock.advance(self.blocked_secs)
        return future

    def discard(self) -> int:
        self.discarded += 1
        return 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("stager.demo.measure.time.perf_counter", clock.perf_counter)
    return clock


def test_lost_time_is_the_blocked_time_and_the_slower_steps(clock: Clock) -> None:
    blocking = FakeSaver(clock, "blocking", blocked_secs=5.0, done_secs=5.0)
    background = FakeSaver(clock, "background", blocked_secs=0.5, done_secs=10.0)
    results = list(measure(Meter(Run(clock), 4), [blocking, background], num_saves=2))

    samples = [result for result in results if isinstance(result, MeasuredSave)]
    assert [sample.method for sample in samples] == ["blocking", "background", "background", "blocking"]
    # The background save takes 8 steps of 1.25 s, the last of which ends after it is complete.
    assert samples[0] == MeasuredSave("blocking", 5.0, 5.0, 5.0, 4, 1.0, 1000)
    assert samples[1] == MeasuredSave("background", 0.5, 2.5, 10.0, 8, 1.0, 1000)
    assert samples[2:] == [samples[1], samples[0]]
    assert blocking.discarded == background.discarded == 3  # the first save of each is not counted


def test_stretches_without_a_save_stand_before_and_after_each_save(clock: Clock) -> None:
    saver = FakeSaver(clock, "blocking", 1.0, 1.0)
    results = list(measure(Meter(Run(clock), 4), [saver], num_saves=2))
    assert [type(result) for result in results] == [Stretch, Stretch, MeasuredSave, Stretch, MeasuredSave]
    assert {result.secs for result in results if isinstance(result, Stretch)} == {4.0}


def test_a_save_that_never_completes_is_an_error(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "MAX_STEPS_WAITED", 20)
    stuck = FakeSaver(clock, "stuck", 1.0, float("inf"))
    with pytest.raises(TimeoutError, match="stuck: a save is not complete after 20 training steps"):
        Meter(Run(clock), 4).train_and_save(stuck)


def test_measurement_gives_medians_and_the_noise_between_equal_stretches() -> None:
    samples = [MeasuredSave("a", 1.0, lost, 2.0, 4, 1.0, 10) for lost in (5.0, 1.0, 3.0)]
    samples.append(MeasuredSave("b", 9.0, 9.0, 9.0, 4, 1.0, 10))
    measurement = Measurement.of(samples, [Stretch(4, secs) for secs in (4.0, 4.5, 4.0, 6.0)])
    first, second = measurement.methods
    assert (first.method, first.lost_secs, first.lost_range_secs) == ("a", 3.0, (1.0, 5.0))
    assert (second.method, second.blocked_secs) == ("b", 9.0)
    assert measurement.noise_secs == 0.5
    assert measurement.step_secs == 4.25 / 4


@pytest.mark.parametrize(("lost_secs", "ratio"), [(0.5, 4.0), (0.1, None), (-0.1, None)])
def test_ratio_is_given_only_where_the_first_methods_loss_exceeds_the_noise(
    lost_secs: float, ratio: float | None
) -> None:
    samples = [MeasuredSave(name, 0.1, lost, 1.0, 4, 1.0, 10) for name, lost in (("a", lost_secs), ("b", 2.0))]
    measurement = Measurement.of(samples, [Stretch(4, 4.0), Stretch(4, 4.25)])
    assert measurement.relative_loss(measurement.methods[1]) == ratio
