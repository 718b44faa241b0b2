"""The chart is a picture of the right size, whatever there is to show."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from stager.demo.chart import draw_chart
from stager.demo.events import (
    MeasuredSave,
    RankEvent,
    Resumed,
    SaveBegun,
    SaveCommitted,
    SaveStaged,
    StepDone,
    Stretch,
    write_loss,
)
from stager.demo.leg import Aim, Kill, Leg
from stager.demo.results import Measurement, Results
from stager.demo.timeline import save_lines


def make_legs(directory: Path = Path()) -> list[Leg]:
    """A run killed in its second save, which its workers finish, and resumed."""
    killed = Leg("killed-1", directory)
    for event in (
        StepDone(5, 3.0, 99.0),
        SaveBegun(5, 100.0),
        StepDone(6, 2.9, 100.25),
        SaveStaged(5, 100.03),
        SaveCommitted(5, 10, 0.01, 0.03, 0.2, 0.3, 0.31),
        SaveBegun(10, 101.0),
        SaveStaged(10, 101.04),
    ):
        killed.note(RankEvent(0, event))
    killed.kill = Kill(Aim.WRITING, 10, 101.05, True, False, True, 2, -9, 0.1, 0.1, ())
    resumed = Leg("resumed", directory)
    resumed.first.resumed = Resumed(10)
    for event in (SaveBegun(15, 110.0), SaveCommitted(15, 10, 0.01, 0.02, 0.1, 0.2, 0.21)):
        resumed.note(RankEvent(0, event))
    return [killed, resumed]


def make_measurement(lost_secs: float = 0.1) -> Measurement:
    methods = ("stager", "torch.save", "dcp.async_save")
    samples = [MeasuredSave(method, 0.05, lost_secs, 0.5, 6, 0.2, 10) for method in methods for _ in range(3)]
    return Measurement.of(samples, [Stretch(6, 1.2), Stretch(6, 1.3)])


@pytest.mark.parametrize(
    "results",
    [
        Results(legs=make_legs(), measurement=make_measurement()),
        Results(legs=make_legs(), measurement=make_measurement(lost_secs=-0.01)),
        Results(legs=make_legs() * 9, measurement=make_measurement()),
        Results(),
    ],
    ids=["usual", "nothing lost", "many saves", "nothing at all"],
)
def test_chart_is_a_valid_png(results: Results, tmp_path: Path) -> None:
    draw_and_look(results, tmp_path)


def test_without_a_measurement_the_losses_of_every_run_are_drawn(tmp_path: Path) -> None:
    legs = make_legs(tmp_path)
    with open(legs[0].losses, "w", encoding="utf-8") as file:
        for step in range(1, 12):
            write_loss(file, step, 5.0 / step)
    draw_and_look(Results(Leg("uninterrupted", tmp_path), legs=legs, others=[Leg("on-4", tmp_path, 4)]), tmp_path)


def draw_and_look(results: Results, tmp_path: Path) -> None:
    draw_chart(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(tmp_path / "demo.png")
    height, width, _ = pixels.shape
    assert width >= 1200
    assert height >= 600
    assert pixels.std() > 0.01  # not a blank sheet


def test_timeline_tells_each_save_from_its_call_to_its_end() -> None:
    first, cut, last = save_lines(make_legs())
    assert first.milestones == {"staged": 0.03, "written": 0.2, "synced": 0.3, "committed": 0.31}
    assert (first.label, first.blocked_secs, first.killed_secs) == ("step 5", 0.01, None)
    assert first.step_ends == (0.25,)  # the step before the save is not part of it
    assert first.leg == "from the start"

    assert cut.milestones == {"staged": pytest.approx(0.04)}
    assert cut.killed_secs == pytest.approx(0.05)
    assert (cut.blocked_secs, cut.ending) == (None, "finished by its workers")
    assert last.leg == "resumed from step 10"


def test_save_that_nobody_finished_is_said_to_be_discarded() -> None:
    killed, resumed = make_legs()
    resumed.first.resumed = Resumed(5)
    assert save_lines([killed, resumed])[1].ending == "discarded"
