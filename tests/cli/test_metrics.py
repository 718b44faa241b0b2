"""The metrics of checkpoints in ``stager ls`` and ``stager inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stager.cli.app import app
from tests.persistence.tasks import save
from tests.retention.runs import make_run


@pytest.fixture
def run(run_dir: Path) -> Path:
    make_run(run_dir, (1,))
    save(run_dir, step=2, metrics={"loss": 0.25, "f\x1b1": float("nan")})
    return run_dir


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_ls_shows_metrics_where_there_are_some(run: Path) -> None:
    text = output("ls", str(run))
    assert "metrics" in text and "loss 0.25" in text and "f\\x1b1 nan" in text
    rows = json.loads(output("ls", str(run), "--json"))["checkpoints"]
    assert [row["metrics"] for row in rows] == [{}, {"loss": 0.25, "f\x1b1": "nan"}]  # JSON has no NaN


def test_ls_has_no_column_for_metrics_that_nobody_gave(run_dir: Path) -> None:
    make_run(run_dir, (1,))
    assert "metrics" not in output("ls", str(run_dir))


def test_inspect_shows_metrics(run: Path) -> None:
    assert "loss 0.25" in output("inspect", str(run), "--step", "2")
    assert "metrics" not in json.loads(output("inspect", str(run), "--json", "--step", "1"))
    assert json.loads(output("inspect", str(run), "--json", "--step", "2"))["metrics"] == {
        "loss": 0.25,
        "f\x1b1": "nan",
    }
