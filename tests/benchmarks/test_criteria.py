"""Figures and verdicts from samples that are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.criteria import Verdict, evaluate
from tests.benchmarks.machine import Machine, Versions
from tests.benchmarks.records import Failure, Limits, Memory, Record, Save, SoakPoint, Speed, State, Stretch
from tests.benchmarks.report import number, write_markdown
from tests.benchmarks.results import CaseResults, Results, Row
from tests.benchmarks.summary import Spread, Unit, figures_of

MIB = 1 << 20


def _save(index: int, staged: float, memcpy: float = 0.1) -> Save:
    return Save(0, index, staged, staged, 1.0, Limits(2 * memcpy, memcpy, None, 0.5))


def _stretch(pair: int, without: float, with_save: float) -> Stretch:
    return Stretch(0, pair, 4, without, with_save, 0.01, 0.2, True, 0.2, 0.1)


def _soak(saves: int, nbytes: int, fds: int) -> SoakPoint:
    return SoakPoint(saves, nbytes, nbytes // 2, fds // 2, fds, 3, 1.0)


def _results(rows: dict[str, dict[str, list[Record]]], scale: float = 1.0) -> Results:
    machine = Machine("cpu", 2, True, 1 << 34, "none", "6", "ext4", 2e9, "never", 1024)
    versions = Versions("3.11", "0", {"torch": "2.13"}, None)
    options = {"scale": scale, "rounds": 1, "saves": 2, "deadline_secs": 300, "seed": 0}
    cases = {
        case: CaseResults(case, f"what {case} is", rows={name: Row(name, records=r) for name, r in peers.items()})
        for case, peers in rows.items()
    }
    return Results("2030-01-01", machine, versions, options, cases)


def _verdict(results: Results, name: str) -> tuple[str, Verdict]:
    (line,) = [line for line in evaluate(results) if line.name == name]
    return line.measured, line.verdict


def test_nothing_measured_is_not_met_and_not_failed() -> None:
    assert {line.verdict for line in evaluate(_results({}))} == {Verdict.NOT_MEASURED}


@pytest.mark.parametrize(("staged", "verdict"), [(0.114, Verdict.MET), (0.116, Verdict.NOT_MET)])
def test_stall_is_compared_pair_by_pair_and_without_the_first_save(staged: float, verdict: Verdict) -> None:
    records: list[Record] = [_save(0, 9.0), _save(1, staged), _save(2, 2 * staged, memcpy=0.2), _save(3, staged)]
    results = _results({"big": {"stager": records}})
    assert _verdict(results, "big: unguarded stall / memcpy, same threads") == (f"{staged * 10:.4g}", verdict)
    assert _verdict(results, "big: first save after warmup() / a later one")[1] is Verdict.NOT_MET


def test_first_save_is_compared_with_the_faster_of_the_other_librarys_two() -> None:
    rows: dict[str, list[Record]] = {
        "stager-cold": [_save(0, 1.0)],
        "torch-checkpointing": [_save(0, 9.0)],
        "torch-checkpointing-buffered": [_save(0, 4.0)],
    }
    name = "big: first save without warmup() / torch_checkpointing's first"
    assert _verdict(_results({"big": rows}), name) == ("0.25", Verdict.MET)


def test_loop_cost_is_the_median_of_paired_differences() -> None:
    rows: dict[str, list[Record]] = {
        "stager-guarded": [_stretch(0, 1.0, 1.02), _stretch(1, 2.0, 2.01), _stretch(2, 1.0, 1.5)],
        "torch-checkpointing-buffered": [_stretch(0, 1.0, 1.1)],
    }
    results = _results({"loop": rows})
    assert _verdict(results, "loop: cost of a guarded save / memcpy, same threads") == ("0.2", Verdict.MET)
    name = "loop: cost of a guarded save, less torch_checkpointing's, ms"
    assert _verdict(results, name) == ("-80", Verdict.MET)


def test_milliseconds_are_only_promised_at_full_size() -> None:
    records: list[Record] = [_save(0, 0.05), _save(1, 0.05)]
    name = "small: stall, ms"
    assert _verdict(_results({"small": {"stager": records}}), name) == ("50", Verdict.MET)
    assert _verdict(_results({"small": {"stager": records}}, scale=0.1), name)[1] is Verdict.NOT_MEASURED


def test_memory_counts_every_worker_and_soak_its_growth() -> None:
    records: list[Record] = [State(100 * MIB, 72), Memory(400 * MIB, 900 * MIB, 3, 10)]
    soak: list[Record] = [_soak(20, 500 * MIB, 40), _soak(2000, 509 * MIB, 40)]
    results = _results({"big": {"stager": records}, "soak": {"stager": soak}})
    assert _verdict(results, "big: peak memory of the tree, MiB") == ("900", Verdict.MET)
    assert _verdict(results, "soak: memory after 2,000 saves, less after 20, MiB") == ("9", Verdict.NOT_MET)
    assert _verdict(results, "soak: descriptors after 2,000 saves, less after 20") == ("0", Verdict.MET)


def test_results_survive_their_file_and_the_page_shows_failures(tmp_path: Path) -> None:
    records: list[Record] = [State(100 * MIB, 72), _save(0, 0.2), _save(1, 0.1), Speed(0, 100.0, 97.0, 0.5)]
    results = _results({"big": {"stager": records, "torchsnapshot": []}, "soak": {}})
    results.cases["big"].rows["torchsnapshot"].fail(Failure("failed", "Error: a | b"))
    results.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded == results
    write_markdown(loaded, tmp_path / "results.md", {})
    page = (tmp_path / "results.md").read_text()
    assert "| torchsnapshot | failed |" in page
    assert "FAILED: Error: a \\| b" in page


def test_every_figure_of_an_empty_row_is_empty() -> None:
    for case in ("big", "loop", "soak"):
        assert all(figure.spread(Row("stager")) is None for figure in figures_of(case))


def test_spread_and_numbers() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([]) is None
    assert [number(value, Unit.SECS) for value in (0.0123, 1.5, 0.99999)] == ["12.3 ms", "1.5 s", "1 s"]
    assert number(0.954, Unit.RATIO) == "0.95"
